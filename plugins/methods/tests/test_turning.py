"""The methods that turn inputs or outputs, OFT, BOFT, HRA and RoAd: what they turn, and sizes that do not fit."""

import copy
from pathlib import Path
from typing import Any

import peft.tuners.boft.layer as peft_boft
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_methods.boft import Butterfly
from tunerkit_methods.oft import Rotation


def adapter_at(layer: nn.Module, method: str, **settings: object) -> Any:
    """The adapter of a layer, with random numbers in it, in fp64."""
    torch.manual_seed(0)
    config = {"targets": "0", "adapter_dtype": "float64", **settings}
    adapter = tunerkit.tuner(tunerkit.wrap(nn.Sequential(layer), method, config)).adapters()["0"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return adapter


def peft_butterfly(t: Tensor) -> Tensor:
    """R (in, in) as PEFT computes it on a GPU, by matrices of permutations and its Cayley transform."""
    count, blocks, size = t.shape[:3]
    layer: Any = peft_boft.BOFTLayer
    total = torch.eye(blocks * size, dtype=t.dtype)
    for i in range(count):
        order = layer.block_butterfly_perm(None, len(total), blocks // 2**i, size // 2, count - 1)
        permutation = layer.perm2mat(None, order).to(t.dtype)
        turned = torch.block_diag(*layer.cayley_batch(None, t[i]))
        total = permutation @ turned @ permutation.T @ total
    return total


@pytest.mark.parametrize(("features", "size", "factors"), [(24, 4, 1), (32, 4, 2), (48, 2, 4), (32, 4, 4)])
def test_a_butterfly_of_several_factors_is_that_of_peft(features: int, size: int, factors: int) -> None:
    """PEFT has several factors on a GPU alone, so the matrices are compared. They are orthogonal."""
    adapter = adapter_at(nn.Linear(features, 8), "boft", block_size=size, factors=factors)
    assert isinstance(adapter, Butterfly)
    one = torch.eye(features, dtype=torch.float64)
    turned = adapter.turned(one, False) + one
    assert torch.allclose(turned, peft_butterfly(adapter.t), atol=1e-12)
    assert torch.allclose(adapter.turned(one, True) + one, turned.T, atol=1e-12)
    assert torch.allclose(turned @ turned.T, one, atol=1e-12)


def test_the_exact_transform_of_oft_is_orthogonal() -> None:
    """R Rᵀ = I in each block; the sum of powers is so to its order alone, where Q is small."""
    exact = adapter_at(nn.Linear(24, 8), "oft", block_size=6, neumann=False)
    assert isinstance(exact, Rotation)
    turned = exact.turn() + torch.eye(6, dtype=torch.float64)
    assert torch.allclose(turned @ turned.mT, torch.eye(6, dtype=torch.float64).expand_as(turned), atol=1e-12)
    summed = adapter_at(nn.Linear(24, 8), "oft", block_size=6, terms=12)
    with torch.no_grad():
        for adapter in (exact, summed):
            adapter.v.copy_(0.01 * torch.ones_like(adapter.v))
        exact.v.neg_()  # PEFT's two forms turn the opposite way
    assert torch.allclose(exact.turn(), summed.turn(), atol=1e-12)


@pytest.mark.parametrize(
    ("method", "settings", "layer", "message"),
    [
        ("oft", {"block_size": 5}, nn.Linear(16, 32), "does not divide 16"),
        ("oft", {}, nn.Conv1d(4, 4, 1, groups=4), "single input"),
        ("oft", {"blocks": 3}, nn.Linear(16, 32), "blocks is 3, which does not divide 16"),
        ("boft", {"block_size": 4, "factors": 3}, nn.Linear(24, 8), "do not fit a layer with 24 inputs"),
        ("boft", {"block_size": 3, "factors": 2}, nn.Linear(24, 8), "do not fit a layer with 24 inputs"),
        ("boft", {"blocks": 3}, nn.Linear(16, 8), "blocks 3 .* do not fit a layer with 16 inputs"),
        ("boft", {}, nn.Embedding(8, 4), "token's number"),
        ("hra", {"rank": 3}, nn.Linear(16, 32), "take an even one"),
        ("hra", {"rank": 18}, nn.Linear(16, 32), "at most 16 fits"),
        ("hra", {}, nn.Embedding(8, 4), "token's number"),
        ("hra", {}, nn.Linear(1, 8), "single input"),
        ("road", {}, nn.Linear(16, 9), "must be even"),
        ("road", {"group_size": 12}, nn.Linear(16, 32), "does not divide 32"),
        ("road", {}, nn.Conv1d(4, 4, 1, groups=4), "1 in each group"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, settings: dict[str, object], layer: nn.Module, message: str) -> None:
    """A size that was given and does not fit, and a layer that cannot be turned, are one line."""
    with pytest.raises(tunerkit.errors.TargetError, match=message):
        tunerkit.wrap(nn.Sequential(layer), method, {"targets": "0", **settings})


def test_a_butterfly_has_one_factor_unless_more_are_asked_for(tmp_path: Path) -> None:
    """PEFT reads one factor everywhere. None means two where they fit, as files of earlier versions say it."""
    assert adapter_at(nn.Linear(16, 8), "boft").t.shape == (1, 4, 4, 4)
    base = nn.Sequential(nn.Linear(16, 8))
    model = tunerkit.wrap(copy.deepcopy(base), "boft", {"targets": "0", "factors": None})
    for parameter in tunerkit.tuner(model).parameters():
        parameter.data.normal_()
    again = tunerkit.load(base, tunerkit.save(model, tmp_path))
    adapter: Any = tunerkit.tuner(again).adapters()["0"]
    assert adapter.t.shape == (2, 4, 4, 4)
    assert torch.equal(again(torch.eye(16)), model(torch.eye(16)))


@pytest.mark.parametrize(
    ("method", "tensor", "shapes"), [("oft", "v", [(4, 3), (4, 1)]), ("boft", "t", [(1, 4, 3, 3), (1, 4, 2, 2)])]
)
def test_blocks_may_be_counted(method: str, tensor: str, shapes: list[tuple[int, ...]]) -> None:
    """Each layer has as many blocks, of its own size; a size beside them would say another number."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), method, {"targets": "*", "blocks": 4})
    assert [getattr(each, tensor).shape for each in tunerkit.tuner(model).adapters().values()] == shapes
    with pytest.raises(tunerkit.errors.ConfigError, match="one of block_size and blocks, got 2 and 4"):
        tunerkit.wrap(nn.Sequential(nn.Linear(12, 8)), method, {"targets": "0", "blocks": 4, "block_size": 2})


@pytest.mark.parametrize("shared", [False, True])
def test_constrained_turns_stay_near_the_identity(shared: bool) -> None:
    """No Q is longer than eps over the root of the number of blocks; a shorter one is as it is."""
    adapter = adapter_at(
        nn.Linear(12, 8), "oft", block_size=4, constrained=True, eps=0.01, neumann=False, shared_block=shared
    )
    with torch.no_grad():
        adapter.v[0] *= 1e-6
        turns = adapter.turn()  # about -2 Q
        length = 0.01 / len(turns) ** 0.5
        expected = [float(2**0.5 * adapter.v[0].norm()), *[length] * (len(turns) - 1)]
        assert torch.allclose(turns.norm(dim=(1, 2)) / 2, torch.tensor(expected, dtype=torch.float64), rtol=1e-4)


def test_oft_turns_what_an_embedding_returns() -> None:
    """Merged and not."""
    torch.manual_seed(0)
    layer = nn.Embedding(6, 8, padding_idx=2)
    model = tunerkit.wrap(nn.Sequential(copy.deepcopy(layer)), "oft", {"targets": "0", "block_size": 4})
    adapter: Any = tunerkit.tuner(model).adapters()["0"]
    ids = torch.tensor([[0, 2, 5]])
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.normal_(std=0.1)
        turn = torch.block_diag(*(adapter.turn() + torch.eye(4)))
        expected = layer(ids) @ turn
        assert torch.allclose(model(ids), expected, atol=1e-5)
        tunerkit.merge(model)
        assert torch.allclose(model(ids), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["oft", "boft", "hra", "road"])
@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3, groups=4), nn.Conv1d(6, 16, 3, dilation=2)])
def test_convolutions_merge(method: str, layer: nn.Conv2d | nn.Conv1d) -> None:
    """Also with groups: no input or output is turned with one of another group, which would be no change of W."""
    torch.manual_seed(0)
    model = tunerkit.wrap(nn.Sequential(copy.deepcopy(layer)), method, {"targets": "0"})
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(2, layer.in_channels, *[9] * (layer.weight.ndim - 2))
        adapted = model(x)
        tunerkit.merge(model)
        assert torch.allclose(model(x), adapted, atol=1e-5)


@pytest.mark.parametrize("method", ["oft", "boft"])
def test_no_block_is_copied_for_each_row_of_the_input(method: str) -> None:
    """What is kept for the backward is a few times the input, and not a matrix for each row and block."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(64, 64)), method, {"targets": "0"})
    x, kept = torch.randn(512, 64, requires_grad=True), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept = max(kept, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert kept <= 2 * x.numel() * x.element_size()


@pytest.mark.parametrize("method", ["oft", "boft", "hra", "road", "dora"])
def test_merging_under_autocast_rounds_nothing(method: str) -> None:
    """What is merged does not depend on the block around the call; a model on the meta device still has its shapes."""
    torch.manual_seed(0)
    model = tunerkit.wrap(nn.Sequential(nn.Linear(16, 32)), method, {"targets": "0"})
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(4, 16)
        adapted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            tunerkit.merge(model)
        assert torch.allclose(model(x), adapted, atol=1e-5)
        tunerkit.unmerge(model)
        assert model.to("meta")(x.to("meta")).shape == (4, 32)
