"""The SVD layer: its masks in copies, moves and state dicts, its scale, and its gradients."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import tunerkit
from plugins.adalora.tests.short_training import SETTINGS, assert_same_weights, attached, layers, live, trained, wrapped
from tests.support import between
from tunerkit.plugin import resize_
from tunerkit_adalora.svd_layer import SvdLayer, weights_of
from tunerkit_testing.product_forms import fused_form, plain_form
from tunerkit_testing.small import X, net, step, trainable

# --- Masks ------------------------------------------------------------------------------------------------------------

PREFIX = "0.tunerkit.default.adapter."


def test_masks_travel_with_the_state_dict() -> None:
    """Masks are neither parameters nor buffers, yet saved and loaded as copies; torch reports a missing one."""
    model, other = trained(), wrapped()
    state, name = model.state_dict(), f"{PREFIX}mask"
    assert [name for name, _ in model.named_buffers()] == []
    assert torch.equal(state[name], layers(model)[0].mask)
    other.load_state_dict(state)
    assert_same_weights(other, model)
    layers(other)[0].mask[:] = False
    assert layers(model)[0].mask.any()
    without = {key: value for key, value in state.items() if key != name}
    with pytest.raises(RuntimeError, match="mask"):
        other.load_state_dict(without)
    assert other.load_state_dict(without, strict=False).missing_keys == [name]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("rank", "mask", "words"),
    [
        (3, torch.ones(2, dtype=torch.bool), r"expected bool \(3,\), got torch.bool \(2,\)"),
        (4, torch.ones(2, dtype=torch.bool), r"expected bool \(4,\), got torch.bool \(2,\)"),
        (3, torch.ones(3, dtype=torch.int8), r"expected bool \(3,\), got torch.int8 \(3,\)"),
        (4, torch.ones(4, dtype=torch.int8), r"expected bool \(4,\), got torch.int8 \(4,\)"),
        (3, torch.ones(9, dtype=torch.bool), "9 triplets, above the initial rank 4"),
        (3, None, "missing, and the weights have 3 triplets"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_its_layer_changes(
    strict: bool, rank: int, mask: Tensor | None, words: str
) -> None:
    """Also where the weights have another rank, to which the layer would be resized: no tensor and no shape changes."""
    model = wrapped()
    state = model.state_dict()
    for name, dim in {"p": 1, "lam": 0, "q": 0}.items():
        state[PREFIX + name] = state[PREFIX + name].narrow(dim, 0, rank) + 1.0
    del state[f"{PREFIX}mask"]
    if mask is not None:
        state[f"{PREFIX}mask"] = mask
    layer = layers(model)[0]
    before, parameters = copy.deepcopy(layer.state_dict()), list(map(id, layer.parameters()))
    with pytest.raises(RuntimeError, match=rf"adapter\.mask: {words}"):
        model.load_state_dict(state, strict=strict)
    assert list(map(id, layer.parameters())) == parameters
    after = layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "dtype and back": lambda model: copy.deepcopy(model).to(torch.float64).to(torch.float32),
    "device": lambda model: copy.deepcopy(model).to("cpu"),
}


@pytest.mark.parametrize("way", COPIES)
def test_masks_survive_copies_moves_and_pickling(way: str) -> None:
    """Weights, masks, ranks and budget equal the original's, and the copy's are independent."""
    model = trained()
    twin = COPIES[way](model)
    assert_same_weights(twin, model)
    assert tunerkit.tuner(twin).ranks() == tunerkit.tuner(model).ranks()
    assert tunerkit.tuner(twin).budget() == 6
    assert torch.equal(twin(X), model(X))
    layers(twin)[0].mask[:] = False
    assert layers(model)[0].mask.any()


@pytest.mark.filterwarnings("ignore:.*above the final")
@pytest.mark.parametrize("assign", [False, True], ids=["into to_empty", "assigned"])
def test_masks_come_back_from_meta_with_the_weights(assign: bool) -> None:
    """From a state_dict of a half pruned training; the model can be trained again."""
    source = trained(8, shrink=True)
    model = wrapped().to("meta")
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert [layer.mask.tolist() for layer in layers(model)] == [layer.mask.tolist() for layer in layers(source)]
    assert torch.equal(model(X), source(X))
    step(model, attached(model))


def test_a_layer_without_triplets_has_memory_in_a_state_dict() -> None:
    """Otherwise accelerate takes it for shared: it leaves out all but one of the tensors at one address."""
    model = wrapped(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), targets=["0", "1"])
    for layer in layers(model):
        for parameter, shape in ((layer.p, (4, 0)), (layer.lam, (0,)), (layer.q, (0, 4))):
            resize_(parameter, torch.empty(shape))
        layer.set_mask(layer.mask[:0], rank=0)
    own = {name: tensor for name, tensor in model.state_dict().items() if not tensor.numel()}
    assert len(own) == 8
    assert len({tensor.untyped_storage().data_ptr() for tensor in own.values()}) == 8
    assert all(tensor.shape == model.state_dict(keep_vars=True)[name].shape for name, tensor in own.items())


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_a_layer_is_printed_with_the_ranks_that_are_left() -> None:
    """One line: live and initial rank; without values, as on the meta device, nothing is known of the first."""
    layer = SvdLayer(in_features=4, out_features=3, rank=3, scale=0.5, dropout=0.1, start="lora")
    layer.mask = torch.tensor([True, False, True])
    assert repr(layer) == "SvdLayer(rank=2 of 3, scale=0.5, dropout=0.1)"
    assert repr(layer.to("meta")) == "SvdLayer(rank=? of 3, scale=0.5, dropout=0.1)"


def test_the_scale_is_the_initial_ranks_and_stays_when_ranks_fall() -> None:
    """Output = base + (alpha / init_rank) · P Λ Q x, before and after pruning."""
    model = wrapped(alpha=6.0, init_rank=4)
    base, adapted, layer = net().get_submodule("0"), model.get_submodule("0"), layers(model)[0]
    optimizer = attached(model)
    for _ in range(20):
        step(model, optimizer)
        expected = base(X) + (6.0 / 4) * (X @ layer.q.T * layer.lam @ layer.p.T)
        torch.testing.assert_close(adapted(X), expected)
    assert layer.rank < 4
    tunerkit.merge(model)
    torch.testing.assert_close(adapted(X), expected)


@pytest.mark.parametrize("way", ["parametrised", "pruned by torch"])
def test_weights_that_torch_computes_are_read_where_it_keeps_them(way: str) -> None:
    """A parametrised factor is no longer a parameter of the layer, and `torch.nn.utils.prune` renames one."""
    model = wrapped()
    layer = layers(model)[0]
    nn.init.normal_(layer.p)
    if way == "parametrised":
        parametrize.register_parametrization(layer, "p", Halved())
    else:
        prune.l1_unstructured(layer, "p", 0.3)  # type: ignore[no-untyped-call]
    assert "p" not in layer._parameters
    assert torch.equal(layer.weights.p, layer.p)
    assert (layer.weights.lam, layer.weights.q) == (layer.lam, layer.q)
    assert all(map(torch.equal, weights_of([layer]), layer.weights))
    expected = net().get_submodule("0")(X) + layer.scale * (X @ layer.q.T * layer.lam @ layer.p.T)
    torch.testing.assert_close(model.get_submodule("0")(X), expected)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("shape", between.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", between.DTYPES, ids=str)
@pytest.mark.parametrize("scenario", between.SCENARIOS)
def test_what_is_replaced_between_two_reads_ends_as_in_the_plain_form(
    scenario: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Nothing of an input or a weight is remembered from one read to the next."""
    between.agree("adalora", {}, scenario, shape, dtype)


def test_gradients_after_an_allocation_are_those_of_the_plain_form() -> None:
    """Triplets were removed by then, and ranks differ."""
    model = wrapped(net().double(), adapter_dtype="float64", shrink=True)
    x = X.double().requires_grad_()
    optimizer = attached(model)
    for _ in range(20):
        step(model, optimizer, lambda model: model(x).square().sum())
    assert live(model) == 6
    found = []
    for form in (fused_form, plain_form):
        with form():
            loss = model(x).square().sum()
            found.append(torch.autograd.grad(loss, [x, *trainable(model)], materialize_grads=True))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-13)


# --- Base layers ------------------------------------------------------------------------------------------------------


def _conv1d_of_transformers() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)


IMAGES = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(3))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), X),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), X),
    "transformers conv1d": (_conv1d_of_transformers, X),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, dilation=2), IMAGES[..., 0]),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), IMAGES[..., 0]),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), IMAGES),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), IMAGES),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"), IMAGES),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGES),
    "conv2d replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", groups=2), IMAGES),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), IMAGES[..., None].expand(-1, -1, -1, -1, 3)),
    "embedding": (lambda: nn.Embedding(9, 5), torch.arange(8).reshape(2, 4)),
    "embedding padded": (lambda: nn.Embedding(9, 5, padding_idx=2), torch.arange(8).reshape(2, 4)),
}
STARTS = [("linear", "gaussian"), ("linear", "orthonormal"), *((name, "lora") for name in LAYERS)]


@pytest.mark.parametrize(("name", "start"), STARTS, ids=", ".join)
def test_every_kind_of_base_layer_trains_prunes_merges_and_loads(name: str, start: str, tmp_path: Path) -> None:
    """The loss falls, the budget is exact, merged output equals the adapted one, unmerging restores the base."""
    build, x = LAYERS[name]

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(build())

    model = tunerkit.wrap(base(), "adalora", {**SETTINGS, "targets": ["0"], "start": start, "gamma": 0.01}, seed=0)
    y = base()(x).detach()
    assert torch.equal(model(x), y)
    target = y + torch.sin(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape)
    optimizer = attached(model)
    losses = [step(model, optimizer, lambda model: (model(x) - target).square().mean()) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert live(model) == 2
    adapted = model(x).detach()
    if name == "embedding padded":
        assert torch.equal(adapted[x == 2], y[x == 2])
    assert torch.equal(tunerkit.load(base(), tunerkit.save(model, tmp_path))(x), adapted)
    tunerkit.merge(model)
    assert (model(x) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    with tunerkit.disabled(tunerkit.unmerge(model)):
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("start", ["lora", "gaussian", "orthonormal"])
def test_weights_start_as_the_setting_says(start: str) -> None:
    """ΔW is 0: P = 0 and Λ = 1 with Q as LoRA's A, or Λ = 0 with normal or orthonormal P and Q."""
    settings: dict[str, Any] = {"in_features": 70, "out_features": 50, "rank": 30, "scale": 1.0, "dropout": 0.0}
    torch.manual_seed(0)
    layer = SvdLayer(**settings, start=start)
    assert torch.equal(layer.lam.detach(), torch.ones(30) if start == "lora" else torch.zeros(30))
    if start == "orthonormal":
        assert torch.allclose(layer.q @ layer.q.T, torch.eye(30), atol=1e-5)
        assert torch.allclose(layer.p.T @ layer.p, torch.eye(30), atol=1e-5)
    elif start == "gaussian":
        assert layer.q.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.p.std().item() == pytest.approx(0.02, rel=0.05)
    else:
        assert not layer.p.any()
        assert 0.99 * 70**-0.5 < layer.q.abs().max() <= 70**-0.5
