"""Each method that PEFT has computes what PEFT's does, from the same weights, and is trained to the same weights."""

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import attrs
import peft
import pytest
import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.c3a.utils import BlockCircularConvolution
from torch import Tensor, nn

import tunerkit
from tunerkit.hooks import registry
from tunerkit.plugin import Adapter

LEAVES = ("lin", "out")


@attrs.frozen
class Row:
    """A method and PEFT's way of the same.

    Attributes:
        method: Our name.
        settings: Our settings.
        config: PEFT's config class.
        arguments: Its arguments.
        alike: What reads PEFT's layer beside the tensors that the method names, if something must be copied by hand.
        steps: The largest difference of weights after 20 steps.
        instead: What replaces a part of PEFT or torch during the test, by its dotted name.
    """

    method: str
    settings: Mapping[str, Any]
    config: type
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    alike: Callable[[nn.Module, nn.Module], None] | None = None
    steps: float = 1e-9
    instead: Mapping[str, Any] = attrs.field(factory=dict)


class Fp64:
    """The module torch, where fp32 is fp64, for methods that PEFT computes in fp32 whatever the weights are."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: int, **options: Any) -> Tensor:
        return torch.zeros(*size, **{"dtype": self.float32, **options})


class Convolution:
    """C3A's convolution as PEFT computes it, differentiated by torch: PEFT's own gradient of the input is wrong."""

    @staticmethod
    def apply(x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = BlockCircularConvolution.forward(SimpleNamespace(save_for_backward=lambda *saved: None), x, w)
        return out


ROWS = (
    Row(
        "c3a",
        {"block_size": 4},
        peft.C3AConfig,
        {"block_size": 4, "init_weights": "gaussian"},
        instead={"peft.tuners.c3a.layer.torch": Fp64(), "peft.tuners.c3a.layer.BlockCircularConvolution": Convolution},
    ),
    Row(
        "fourierft",
        {"count": 30, "scale": 100.0, "seed": 5},
        peft.FourierFTConfig,
        {"n_frequency": 30, "scaling": 100.0, "random_loc_seed": 5},
        instead={"peft.tuners.fourierft.layer.torch": Fp64(), "torch.Tensor.float": Tensor.double},
    ),
    Row("delora", {"rank": 3}, peft.DeloraConfig, {"r": 3, "init_weights": False}),
    # PEFT rounds the scale to fp32, so it is one that fp32 has.
    # Without its CUDA extension, PEFT computes with one factor whatever its config says.
    Row("boft", {"block_size": 4, "factors": 1}, peft.BOFTConfig, {"boft_block_size": 4, "init_weights": False}),
    Row(
        "dora",
        {"rank": 3, "alpha": 6.0},
        peft.LoraConfig,
        {"r": 3, "lora_alpha": 6, "use_dora": True, "init_lora_weights": False},
    ),
    Row("hra", {"rank": 4}, peft.HRAConfig, {"r": 4, "init_weights": False}),
    Row("ia3", {"feedforward": ["out"]}, peft.IA3Config, {"feedforward_modules": ["out"], "init_ia3_weights": False}),
    Row("loha", {"rank": 3, "alpha": 6.0}, peft.LoHaConfig, {"r": 3, "alpha": 6, "init_weights": False}),
    Row("oft", {"block_size": 4}, peft.OFTConfig, {"oft_block_size": 4, "init_weights": False}),
    Row(
        "oft",
        {"block_size": 4, "neumann": False, "shared_block": True},
        peft.OFTConfig,
        {"oft_block_size": 4, "use_cayley_neumann": False, "block_share": True, "init_weights": False},
    ),
    Row("road", {"variant": 1, "group_size": 4}, peft.RoadConfig, {"group_size": 4, "init_weights": False}),
    Row(
        "road",
        {"variant": 2, "group_size": 4},
        peft.RoadConfig,
        {"variant": "road_2", "group_size": 4, "init_weights": False},
    ),
    Row(
        "road",
        {"variant": 4, "group_size": 2},
        peft.RoadConfig,
        {"variant": "road_4", "group_size": 2, "init_weights": False},
    ),
    Row("vera", {"rank": 6, "key": 5}, peft.VeraConfig, {"r": 6, "projection_prng_key": 5, "init_weights": False}),
    Row("lokr", {"rank": 1, "alpha": 3.0}, peft.LoKrConfig, {"r": 1, "alpha": 3, "init_weights": False}),
    Row(
        "lokr",
        {"rank": 1, "alpha": 2.0, "factor": 4, "decompose_both": True},
        peft.LoKrConfig,
        {"r": 1, "alpha": 2, "decompose_factor": 4, "decompose_both": True, "init_weights": False},
    ),
    Row("miss", {"rank": 4}, peft.MissConfig, {"r": 4, "init_weights": False}),
    # Neither 12 nor 20 inputs are a multiple: the last shard is shorter.
    Row("miss", {"rank": 7}, peft.MissConfig, {"r": 7, "init_weights": False}),
    # The bases are not copied: the same seed draws them.
    Row(
        "randlora",
        {"rank": 3, "alpha": 6.0, "seed": 2, "save_bases": False},
        peft.RandLoraConfig,
        {"r": 3, "randlora_alpha": 6, "projection_prng_key": 2, "save_projection": False, "init_weights": False},
    ),
    Row(
        "vblora",
        {"rank": 3, "vectors": 10, "length": 4},
        peft.VBLoRAConfig,
        {"r": 3, "num_vectors": 10, "vector_length": 4, "init_logits_std": 1.0, "init_vector_bank_bound": 0.5},
    ),
    # Both draw the entries from the same seed.
    Row("shira", {"rank": 2, "mask_seed": 5}, peft.ShiraConfig, {"r": 2, "random_seed": 5, "init_weights": False}),
    Row("tinylora", {"size": 6}, peft.TinyLoraConfig, {"u": 6, "init_weights": "uniform"}),
    Row("tinylora", {"size": 6, "tying": 0.5}, peft.TinyLoraConfig, {"u": 6, "weight_tying": 0.5}),
)


@pytest.fixture(autouse=True)
def replaced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row replaces is replaced."""
    for name, value in request.getfixturevalue("row").instead.items():
        monkeypatch.setattr(name, value)


class Net(nn.Module):
    """Two linear layers of other sizes, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.lin(x)))
        return out


def both(row: Row) -> tuple[nn.Module, Any]:
    """Our model and PEFT's, on the same base, with the same random weights in their adapters."""
    torch.manual_seed(0)
    base = Net().double()
    theirs = peft.get_peft_model(copy.deepcopy(base), row.config(target_modules=list(LEAVES), **row.arguments)).double()
    ours = tunerkit.wrap(base, row.method, {"targets": list(LEAVES), "adapter_dtype": "float64", **row.settings})
    for mine, other in every_pair(row, ours, theirs):
        with torch.no_grad():
            mine.copy_(other.reshape(mine.shape))
    if row.alike is not None:
        for name in LEAVES:
            row.alike(tunerkit.tuner(ours).adapters()[name], theirs.base_model.model.get_submodule(name))
    return ours, theirs


def trained(row: Row) -> tuple[nn.Module, Any]:
    """Both after 20 steps of AdamW."""
    models = both(row)
    # Drawn before: some methods of PEFT draw numbers in each forward.
    batches = torch.randn(20, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for model in models:
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        for x in batches:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return models


def every_pair(row: Row, ours: nn.Module, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Our tensors and PEFT's: those that both layers share, then those of each layer."""
    adapters = tunerkit.tuner(ours).adapters()
    layers = {name: theirs.base_model.model.get_submodule(name) for name in LEAVES}
    return [
        *shared_pairs(row, adapters[LEAVES[0]], theirs),
        *(pair for name in LEAVES for pair in pairs(row, adapters[name], layers[name])),
    ]


def shared_pairs(row: Row, adapter: Adapter, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Our trained tensors and PEFT's that all layers share. A star at the end of a name stands for many of them."""
    found: list[tuple[Tensor, Tensor]] = []
    for mine, leaf in registry.get(row.method).foreign["peft"].get("shared", {}).items():
        own = {name: each for name, each in adapter.shared.named_parameters() if each.requires_grad}
        name = leaf if isinstance(leaf, str) else leaf["name"]
        if mine.endswith(".*"):
            owner = theirs.base_model.get_submodule(name.removesuffix(".*"))["default"]
            stem = mine.removesuffix("*")
            found += [(each, owner[key.removeprefix(stem)]) for key, each in own.items() if key.startswith(stem)]
        elif mine in own:
            found.append((own[mine], getattr(theirs.base_model, name)["default"]))
    return found


def pairs(row: Row, adapter: nn.Module, layer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Our tensors and PEFT's at a layer, by the names that the method declares."""
    found = []
    for ours, name in registry.get(row.method).foreign["peft"]["tensors"].items():
        leaf = name if isinstance(name, str) else name["name"]
        leaf = leaf if isinstance(leaf, str) else leaf[0]
        if not isinstance(name, str) and name.get("optional") and not hasattr(adapter, ours):
            assert "default" not in getattr(layer, leaf)
            continue
        owner: Any = layer
        for part in leaf.split("."):
            owner = getattr(owner, part)
            if isinstance(owner, nn.ParameterDict | nn.ModuleDict | BufferDict | dict):
                owner = owner["default"]
        owner = owner.weight if isinstance(owner, nn.Module) else owner  # DoRA's m, which is saved without ".weight"
        found.append((getattr(adapter, ours), owner))
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.method)
def test_computes_what_peft_computes(row: Row) -> None:
    """Output, the gradient of the input and those of all tensors agree to 1e-12 of the largest."""
    ours, theirs = both(row)
    torch.manual_seed(1)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for model in (ours, theirs):
        out = model(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        model.zero_grad()
        out.square().sum().backward()
        results.append((out, grad))
    for mine, other in zip(*results, strict=True):
        assert (mine - other).abs().max() <= 1e-12 * other.abs().max()
    for mine, other in every_pair(row, ours, theirs):
        if mine.requires_grad and mine.is_leaf and other.is_leaf:
            assert mine.grad is not None
            assert other.grad is not None
            difference = (mine.grad.reshape(other.shape) - other.grad).abs().max()
            assert difference <= 1e-12 * other.grad.abs().max() + 1e-15


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.method)
def test_trains_as_peft_does(row: Row) -> None:
    """After 20 steps of AdamW, all weights are within 1e-9 of PEFT's."""
    for mine, other in every_pair(row, *trained(row)):
        assert (mine - other.reshape(mine.shape)).abs().max() <= row.steps
