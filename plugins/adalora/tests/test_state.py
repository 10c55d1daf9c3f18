"""AdaLoRA's training state: in every precision, saved and restored, copied, with every kind of base layer."""

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.adalora.tests.short_training import (
    SETTINGS,
    TOTAL,
    adamw,
    assert_same_weights,
    attached,
    layers,
    live,
    masked_lambdas,
    wrapped,
)
from tunerkit import hooks, injection
from tunerkit.plugin import State
from tunerkit_adalora import AdaLoraConfig
from tunerkit_adalora.state import restore
from tunerkit_adalora.svd_layer import SvdLayer
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import TARGETS, X, loss_of, net, step, train, trainable

# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_scores_do_not_underflow_in_any_adapter_dtype(dtype: str) -> None:
    """Importance is averaged in fp32 or wider: with tiny fp16 gradients, scores still rank triplets.

    The gradients of every second triplet are a hundred times smaller. In fp16, their products would all be 0.
    """
    model = wrapped(adapter_dtype=dtype)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    for number in range(TOTAL):
        for layer in layers(model):
            index = torch.arange(len(layer.lam))
            size = torch.where(index % 2 == 1, 1e-4, 1e-6) * (1 + number % 3)
            for weight in (layer.p, layer.lam, layer.q):
                shaped = size[:, None] if weight is layer.q else size
                weight.grad = shaped.expand_as(weight).to(weight.dtype).clone()
        optimizer.step()
    assert all(layer.lam.dtype == getattr(torch, dtype) for layer in layers(model))
    assert all(layer.mask.tolist() == [False, True, False, True] for layer in layers(model))


@pytest.mark.parametrize("kind", ["foreach", "fused", "loop"])
def test_under_a_grad_scaler_with_an_overflow_the_budget_is_exact_at_the_end(kind: str) -> None:
    """The default scale of 2**16 overflows once: no infinity reaches the averages, and pruning continues."""
    options = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}[kind]
    model = wrapped(gamma=0.1)
    optimizer = adamw(model, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    tuner = tunerkit.tuner(model)
    for number in range(TOTAL + 2):
        optimizer.zero_grad()
        loss = loss_of(model) * (1e38 if number in (3, 9) else 1.0)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        training = training_of(tuner)
        assert all(bool(t.isfinite().all()) for t in itertools.chain(*training.averages))
    assert tuner.steps == TOTAL
    assert live(model) == 6
    assert all(bool(p.isfinite().all()) for p in trainable(model))


# --- State ------------------------------------------------------------------------------------------------------------


def resumed(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh model and optimizer that resume from the state of the given ones."""
    path = tunerkit.save(model, folder)
    tunerkit.save_state(model, folder)
    again = tunerkit.load(net(), path, trainable=True)
    fresh = adamw(again)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tunerkit.attach(again, fresh, total_steps=TOTAL)
    tunerkit.load_state(again, folder)
    return again, fresh


@pytest.mark.parametrize("changes", [{"gamma": 0.1}, {"exact_svd": True}], ids=["regulariser", "rotated"])
@pytest.mark.parametrize("at", range(1, TOTAL))
def test_a_run_split_at_any_step_continues_bit_identically(at: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Split before, at, between or after allocations, the resumed run has the whole run's weights, masks and budget."""
    whole = wrapped(**changes)
    optimizer = attached(whole)
    for _ in range(at):
        step(whole, optimizer)
    part, again = resumed(whole, optimizer, tmp_path)
    assert_same_weights(part, whole)
    for _ in range(at, TOTAL):
        assert step(part, again) == step(whole, optimizer)
        assert_same_weights(part, whole)
        assert tunerkit.tuner(part).steps == tunerkit.tuner(whole).steps
        assert tunerkit.tuner(part).budget() == tunerkit.tuner(whole).budget()
    assert live(part) == 6


def test_gradients_left_out_before_saving_are_reported_after_loading(tmp_path: Path) -> None:
    """The count of bad gradients is part of the state."""
    model = wrapped()
    optimizer = attached(model)
    step(model, optimizer)
    training_of(tunerkit.tuner(model)).gradients.left_out += 3
    part, again = resumed(model, optimizer, tmp_path)
    with pytest.warns(tunerkit.TunerkitWarning, match=r"\b3 of 54 gradients"):
        train(part, again, 5)


def test_a_state_of_other_shapes_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Averages of another config's ranks, or the masks of a shrunk adapter for one that still has all triplets."""
    model = wrapped(shrink=True)
    optimizer = attached(model)
    train(model, optimizer, TOTAL)
    tunerkit.save_state(model, tmp_path)
    for rank, error, words in (
        (5, tunerkit.errors.FileError, "init_rank 4 -> 5"),
        (4, tunerkit.errors.StepError, "do not fit"),
    ):
        other = wrapped(shrink=True, init_rank=rank)
        attached(other)
        with pytest.raises(error, match=words):
            tunerkit.load_state(other, tmp_path)
        assert tunerkit.tuner(other).steps == 0
        assert tunerkit.tuner(other).history == []
        assert live(other) == 3 * rank


WRONG_VALUES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda values: values.pop("averaged"), "'averaged' is missing"),
    "no number": (lambda values: values.update(last_step="5"), "'last_step' is '5', expected an integer"),
    "a fraction": (lambda values: values.update(seen=9.0), "'seen' is 9.0, expected an integer"),
    "a flag for a number": (lambda values: values.update(seen=True), "'seen' is True, expected an integer"),
    "a number for a flag": (lambda values: values.update(final=0), "'final' is 0, expected true or false"),
    "negative": (lambda values: values.update(in_force=-1), "'in_force' is -1, expected 0 or more"),
    "too large": (lambda values: values.update(seen=2**63), "below 2"),
    "null": (lambda values: values.update(anew=None), "'anew' is None, expected true or false"),
    "a budget that rises": (lambda values: values.update(target=13), "'target' 13 is above 'initial' 12"),
    "more in force than ever": (lambda values: values.update(in_force=13), "'in_force' 13 is above 'initial' 12"),
    "more left out than seen": (lambda values: values.update(left_out=99), "'left_out' 99 is above 'seen'"),
    "shrunk too early": (lambda values: values.update(shrunk=True), "'shrunk' is true and 'final' is not"),
    "blank after steps": (lambda values: values.update(blank=True), "'blank' is true although steps were taken"),
    "all at once": (
        lambda values: values.clear(),
        "'initial' is missing; 'target' is missing; .*'left_out' is missing",
    ),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_state_with_a_wrong_value_is_refused_and_changes_nothing(name: str) -> None:
    """All values are checked before anything is changed; the message has the name, the value and what is allowed."""
    spoil, words = WRONG_VALUES[name]
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, 7)
    state = injection.training_state(tunerkit.tuner(model))
    values = dict(state.values)
    spoil(values)
    assert_refused(State(state.tensors, values), tunerkit.errors.FileError, words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["sensitivity.0", "uncertainty.8"])
def test_averages_that_cannot_be_are_refused_and_change_nothing(name: str, value: float) -> None:
    """Averages of absolute values are finite and not negative: a score would never recover from NaN."""
    model = wrapped()
    train(model, attached(model), 7)
    state = injection.training_state(tunerkit.tuner(model))
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    tensors[name].view(-1)[0] = value
    assert_refused(State(tensors, state.values), tunerkit.errors.FileError, f"'{name}' has negative or non-finite")


@pytest.mark.parametrize("name", ["sensitivity.4", "mask.1"])
def test_a_state_without_a_tensor_is_refused_and_changes_nothing(name: str) -> None:
    """A missing tensor is treated like one of another shape."""
    model = wrapped()
    train(model, attached(model), 7)
    state = injection.training_state(tunerkit.tuner(model))
    tensors = {key: tensor for key, tensor in state.tensors.items() if key != name}
    assert_refused(State(tensors, state.values), tunerkit.errors.StepError, f"do not fit .*'{name}' is missing")
    tensors[name] = state.tensors[name][:1].clone()
    words = f"do not fit .*: '{name}' has another shape or dtype"
    assert_refused(State(tensors, state.values), tunerkit.errors.StepError, words)


@pytest.mark.parametrize(("lost", "end"), [(12, ""), (13, "; and 1 more")])
def test_the_first_twelve_problems_of_a_state_are_named_and_the_others_counted(lost: int, end: str) -> None:
    """There may be a problem for each weight. Nothing is counted where all are named."""
    model = wrapped()
    train(model, attached(model), 7)
    state = injection.training_state(tunerkit.tuner(model))
    names = list(state.tensors)[:lost]
    named = "; ".join(f"'{name}' is missing" for name in names[:12])
    tensors = {name: tensor for name, tensor in state.tensors.items() if name not in names}
    words = re.escape(f"do not fit this adapter: {named}{end}. ")
    assert_refused(State(tensors, state.values), tunerkit.errors.StepError, words)


@pytest.mark.parametrize(
    ("part", "error"),
    [("mask.1", tunerkit.errors.StepError), ("averaged", tunerkit.errors.FileError)],
    ids=["tensor", "value"],
)
def test_a_file_that_lacks_a_part_is_named_with_the_part_and_what_to_load_instead(
    part: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The method does not know the file, and the reader of the error needs both."""
    model = wrapped()
    train(model, attached(model), 7)
    state = injection.training_state(tunerkit.tuner(model))
    tensors = {name: tensor for name, tensor in state.tensors.items() if name != part}
    values = {name: value for name, value in state.values.items() if name != part}
    with monkeypatch.context() as lacking:
        lacking.setattr(hooks, "ask", lambda *_, **__: State(tensors, values))
        path = tunerkit.save_state(model, tmp_path)
    with pytest.raises(error) as caught:
        tunerkit.load_state(model, path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert f"'{part}' is missing. Load a state that was saved together with the adapter's weights" in text


def assert_refused(state: State, error: type[Exception], words: str) -> None:
    """Another training, at another step, rejects the state and keeps its own."""
    model = wrapped(seed=1)
    optimizer = attached(model)
    train(model, optimizer, 9)
    tuner = tunerkit.tuner(model)
    before, kept = injection.training_state(tuner), tuner.state
    copied = {name: tensor.clone() for name, tensor in before.tensors.items()}
    with pytest.raises(error, match=words):
        restore(tuner, state)
    assert tuner.state is kept
    after = injection.training_state(tuner)
    assert after.values == before.values
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in copied.items())


@pytest.mark.parametrize("at", [0, 3, 6, 14])
@pytest.mark.parametrize("changes", [{}, {"exact_svd": True}, {"shrink": True}], ids=["masked", "rotated", "shrunk"])
def test_the_values_in_a_file_keep_their_names_and_kinds(at: int, changes: dict[str, Any]) -> None:
    """Older files must load, and new files must keep the format: numbers and flags under these names."""
    model = wrapped(**changes)
    train(model, attached(model), at)
    values = dict(injection.training_state(tunerkit.tuner(model)).values)
    svd, shrunk = bool(changes.get("exact_svd")), bool(changes.get("shrink"))
    expected: dict[int, dict[str, object]] = {
        0: {"last_step": 0, "in_force": 12, "blank": True, "averaged": 0, "seen": 0},
        3: {"last_step": 3, "in_force": 12, "averaged": 3, "seen": 27},
        6: {"last_step": 6, "in_force": 9, "anew": svd, "averaged": 0, "seen": 0},
        14: {"last_step": 14, "in_force": 6, "final": True, "shrunk": shrunk, "averaged": 0, "seen": 0},
    }
    flags = dict.fromkeys(("final", "shrunk", "blank", "anew"), False)
    assert values == {"initial": 12, "target": 6, **flags, "left_out": 0, **expected[at]}
    assert {name: type(value) for name, value in values.items()} == {
        name: bool if name in flags else int for name in values
    }


@pytest.mark.parametrize("anew", [False, True])
def test_an_older_file_is_read(anew: bool) -> None:
    """When ranks were final, older files stored `anew` if the last allocation had rotated; it is ignored."""
    model = wrapped(exact_svd=True)
    train(model, attached(model), 14)
    state = injection.training_state(tunerkit.tuner(model))
    other = wrapped(exact_svd=True, seed=1)
    optimizer = attached(other)
    restore(tunerkit.tuner(other), State(state.tensors, {**state.values, "anew": anew, "later": [1, 2]}))
    assert injection.training_state(tunerkit.tuner(other)).values == state.values
    train(other, optimizer, 2)
    assert not masked_lambdas(other).any()


def pruned(**changes: Any) -> nn.Module:
    model = wrapped(**changes)
    optimizer = attached(model)
    for _ in range(TOTAL):
        step(model, optimizer)
    return model


def test_masks_travel_with_the_state_dict() -> None:
    """Masks are neither parameters nor buffers, yet saved and loaded; torch reports a missing or wrong one."""
    model, other = pruned(), wrapped()
    state = model.state_dict()
    assert [name for name, _ in model.named_buffers()] == []
    name = "0.tunerkit.default.adapter.mask"
    assert torch.equal(state[name], layers(model)[0].mask)
    other.load_state_dict(state)
    assert_same_weights(other, model)
    # A copy: what one trains doesn't reach the other.
    layers(other)[0].mask[:] = False
    assert layers(model)[0].mask.any()
    with pytest.raises(RuntimeError, match="mask"):
        other.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match=r"mask: expected bool \(4,\)"):  # a rank that P, Λ and Q do not share
        other.load_state_dict({**state, name: torch.ones(3, dtype=torch.bool)})
    assert other.load_state_dict({k: v for k, v in state.items() if k != name}, strict=False).missing_keys == [name]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("rank", "mask", "words"),
    [
        (3, torch.ones(2, dtype=torch.bool), "expected bool"),
        (4, torch.ones(2, dtype=torch.bool), "expected bool"),
        (3, torch.ones(3, dtype=torch.int8), "expected bool"),
        (4, torch.ones(4, dtype=torch.int8), "expected bool"),
        (3, torch.ones(9, dtype=torch.bool), "9 triplets, above"),
        (3, None, "missing, and the weights have 3 triplets"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_its_layer_changes(
    strict: bool, rank: int, mask: Tensor | None, words: str
) -> None:
    """Also where the weights have another rank, to which the layer would be resized: no tensor and no shape changes."""
    model = wrapped()
    state = model.state_dict()
    prefix = "0.tunerkit.default.adapter."
    for name, dim in {"p": 1, "lam": 0, "q": 0}.items():
        state[prefix + name] = state[prefix + name].narrow(dim, 0, rank) + 1.0
    state.pop(prefix + "mask")
    if mask is not None:
        state[prefix + "mask"] = mask
    layer = layers(model)[0]
    before, parameters = copy.deepcopy(layer.state_dict()), list(map(id, layer.parameters()))
    with pytest.raises(RuntimeError, match=rf"adapter\.mask: {words}"):
        model.load_state_dict(state, strict=strict)
    assert list(map(id, layer.parameters())) == parameters
    after = layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: copy.deepcopy(model).to(torch.float64).to(torch.float32),
        lambda model: copy.deepcopy(model).to("cpu"),
    ],
    ids=["deepcopy", "pickle", "dtype and back", "device"],
)
def test_masks_survive_copies_moves_and_pickling(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Weights, masks, ranks and budget equal the original's, and the copy's are independent."""
    model = pruned()
    twin = copied(model)
    assert_same_weights(twin, model)
    assert tunerkit.tuner(twin).ranks() == tunerkit.tuner(model).ranks()
    assert tunerkit.tuner(twin).budget() == 6
    assert torch.equal(twin(X), model(X))
    layers(twin)[0].mask[:] = False
    assert layers(model)[0].mask.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_change_of_dtype_leaves_masks_boolean(dtype: torch.dtype) -> None:
    """`.to(dtype)` converts weights but not masks; training continues in the new dtype."""
    model = wrapped()
    optimizer = attached(model)
    for _ in range(9):
        step(model, optimizer)
    masks = [layer.mask.clone() for layer in layers(model)]
    model.to(dtype)
    for layer, mask in zip(layers(model), masks, strict=True):
        assert layer.lam.dtype == dtype
        assert layer.mask.dtype == torch.bool
        assert torch.equal(layer.mask, mask)


def test_a_deep_copied_training_is_independent() -> None:
    """The copy has separate averages: training the original doesn't change them."""
    model = wrapped()
    optimizer = attached(model)
    for _ in range(5):
        step(model, optimizer)
    twin = copy.deepcopy(model)
    before = [t.clone() for t in training_of(tunerkit.tuner(twin)).averages[0]]
    step(model, optimizer)
    after = training_of(tunerkit.tuner(twin)).averages[0]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(t.any() for t in after)


# --- The scale --------------------------------------------------------------------------------------------------------


def test_the_scale_is_the_initial_ranks_and_stays_when_ranks_fall() -> None:
    """Output = base + (alpha / init_rank) · P Λ Q x, before and after pruning."""
    model = wrapped(alpha=6.0, init_rank=4)
    base, adapted, layer = net().get_submodule("0"), model.get_submodule("0"), layers(model)[0]
    optimizer = attached(model)
    for _ in range(TOTAL):
        step(model, optimizer)
        expected = base(X) + (6.0 / 4) * (X @ layer.q.T * layer.lam @ layer.p.T)
        torch.testing.assert_close(adapted(X), expected)
    assert layer.rank < 4
    tunerkit.merge(model)
    torch.testing.assert_close(adapted(X), expected)


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


@pytest.mark.parametrize("start", ["lora", "gaussian", "orthonormal"])
@pytest.mark.parametrize("name", list(LAYERS))
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
    losses = []
    for _ in range(TOTAL):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert live(model) == 2
    adapted = model(x).detach()
    assert not torch.equal(adapted, y)
    if name == "embedding padded":
        assert torch.equal(adapted[x == 2], y[x == 2])
    loaded = tunerkit.load(base(), tunerkit.save(model, tmp_path))
    assert torch.equal(loaded(x), adapted)
    tunerkit.merge(model)
    assert (model(x) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    tunerkit.unmerge(model)
    with tunerkit.disabled(model):
        assert torch.equal(model(x), y)


def test_files_store_the_resolved_defaults(tmp_path: Path) -> None:
    """An adapter keeps its settings even if a later version changes the defaults."""
    given = {"targets": TARGETS, "target_rank": 2}
    model = tunerkit.wrap(net(), "adalora", given, seed=0)
    step(model, attached(model))
    config = tunerkit.tuner(tunerkit.load(net(), tunerkit.save(model, tmp_path))).config
    assert isinstance(config, AdaLoraConfig)
    assert (config.target_rank, config.init_rank, config.alpha) == (2, 8, 4.0)
    assert (config.exact_svd, config.train_lambda) == (True, False)


def test_a_layer_is_printed_with_the_ranks_that_are_left() -> None:
    """One line: live and initial rank; without values, as on the meta device, nothing is known of the first."""
    layer = SvdLayer(in_features=4, out_features=3, rank=3, scale=0.5, dropout=0.1, start="lora")
    layer.mask = torch.tensor([True, False, True])
    assert repr(layer) == "SvdLayer(rank=2 of 3, scale=0.5, dropout=0.1)"
    assert repr(layer.to("meta")) == "SvdLayer(rank=? of 3, scale=0.5, dropout=0.1)"
