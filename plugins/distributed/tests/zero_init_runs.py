"""What is done with bases that `deepspeed.zero.Init` has partitioned, in processes that import this by name."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tunerkit
from plugins.distributed.tests import zero_training
from plugins.distributed.tests.zero_training import ZeroJob
from tests.support import together, toy_formats
from tests.support.toy_starts import PrincipalPlugin
from tunerkit.plugin import Format

_TARGETS = {"rank": 2, "targets": ["0", "2"]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", _TARGETS),
    "adalora": ("adalora", {"init_rank": 3, "target_rank": 2}),
    "copies and biases": ("lora", {**_TARGETS, "bias": "all", "train_modules": ("4",)}),
    "a start that reads weights": ("toy-principal", _TARGETS),
}
_JOB = ZeroJob(3, "lora", _TARGETS, steps=2, init=True)
Said = dict[str, str]


class Attending(nn.Module):
    """A layer that is called, and attention, whose forward uses the weights of its projections directly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)[None]
        found: Tensor = self.attention(h, h, h)[0]
        return found


class Toys:
    """The toy format of other programs."""

    @tunerkit.hookimpl
    def tunerkit_formats(self) -> list[Format]:
        return [Format("toy", toy_formats.sniff, toy_formats.read, toy_formats.write)]


class Matrices(nn.Module):
    """A parameter that belongs to no layer: a router's matrix, or a stack of experts'."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


def do_all(deepspeed: Any, rank: int, folder: Path) -> dict[str, Any]:
    """All that this file does, by name. Every process calls it."""
    tunerkit.register(PrincipalPlugin())
    return {
        "wrapped": {name: _wrapped(deepspeed, *config) for name, config in CONFIGS.items()},
        "inside": _inside(deepspeed),
        "loaded": _loaded(deepspeed, folder, rank),
        "refused": _refused(deepspeed, folder, rank),
        "frozen": _frozen(deepspeed, folder, rank),
        "gathered": _gathered(deepspeed),
        "told": _told(deepspeed),
    }


def _wrapped(deepspeed: Any, method: str, config: dict[str, Any]) -> dict[str, Any]:
    """What wrapping makes of a base in Init, beside what it makes of a whole one."""
    base = zero_training.base(deepspeed, _JOB)
    with deepspeed.zero.GatheredParameters([base.get_parameter("2.weight")]):  # not all need be partitioned
        one, other = (tunerkit.wrap(each, method, config, seed=1) for each in (base, together.net()))
    return {
        "adapters": _equal(one, other),
        "fingerprint": tunerkit.tuner(one).progress.noted == tunerkit.tuner(other).progress.noted,
        "counts": str(tunerkit.trainable_parameters(one)) == str(tunerkit.trainable_parameters(other)),
        "still partitioned": _is_partitioned(one),
    }


def _inside(deepspeed: Any) -> dict[str, bool]:
    """Wrap while the caller is in Init: adapters are whole, and what is built afterwards is not."""
    with deepspeed.zero.Init(config_dict_or_path=zero_training.settings(_JOB)):
        model = tunerkit.wrap(together.net(), "lora", {**_TARGETS, "bias": "all"}, seed=1)
        later = nn.Linear(2, 2)
    plain = tunerkit.wrap(together.net(), "lora", {**_TARGETS, "bias": "all"}, seed=1)
    return {"adapters": _equal(model, plain), "later": later.weight.numel() == 0}


def _loaded(deepspeed: Any, folder: Path, rank: int) -> dict[str, Any]:
    """Load what one process saved onto bases in Init: the same one, and another."""
    file = folder / f"saved{rank}"
    model = tunerkit.wrap(together.net(), "lora", {**_TARGETS, "train_modules": ("4",)}, seed=1)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(0.5)
    tunerkit.save(model, file)
    same, other = zero_training.base(deepspeed, _JOB), together.net()
    with torch.no_grad():
        other.get_parameter("2.weight").mul_(2)
    deepspeed.zero.Init(module=other, config_dict_or_path=zero_training.settings(_JOB))
    said = answer(lambda: tunerkit.load(other, file))
    untouched = not any("tunerkit" in name for name, _ in other.named_modules())
    return {"equal": _equal(tunerkit.load(same, file), model), "other": said, "untouched": untouched}


def _refused(deepspeed: Any, folder: Path, rank: int) -> Said:
    """What must be refused in both processes before anything is changed."""
    said = {}
    model, engine = zero_training.build(deepspeed, _JOB, None)
    said["in an engine"] = answer(lambda: tunerkit.wrap(model, "lora", _TARGETS, adapter="second"))
    said["merge"] = answer(lambda: tunerkit.merge(engine))
    attention = {"rank": 2, "targets": ["attention"]}
    base = Attending()
    deepspeed.zero.Init(module=base, config_dict_or_path=zero_training.settings(_JOB))
    said["attention in Init"] = answer(lambda: tunerkit.wrap(base, "lora", attention))
    coarse = together.net().bfloat16()
    deepspeed.zero.Init(module=coarse, config_dict_or_path=zero_training.settings(_JOB))
    said["dtypes"] = answer(lambda: tunerkit.wrap(coarse, "lora", {**_TARGETS, "train_modules": ("4",)}))
    said["one dtype"] = answer(
        lambda: tunerkit.wrap(coarse, "lora", {**_TARGETS, "train_modules": ("4",), "adapter_dtype": "bfloat16"})
    )
    said["names"] = " ".join(name for name, _ in base.named_modules())
    late = tunerkit.wrap(Attending(), "lora", attention, seed=1)
    engine, *_ = deepspeed.initialize(
        model=late, optimizer=zero_training.adam(late), config=zero_training.settings(_JOB)
    )
    tunerkit.register(Toys())
    toy = folder / f"toy{rank}"
    toy.mkdir()
    toy_formats.write(tunerkit.tuner(tunerkit.wrap(together.net(), "lora", _TARGETS)), toy, None)
    said["format"] = answer(lambda: tunerkit.load(zero_training.base(deepspeed, _JOB), toy))
    said["attention"] = answer(lambda: tunerkit.attach(late, engine, total_steps=2))
    return said


def _frozen(deepspeed: Any, folder: Path, rank: int) -> dict[str, Any]:
    """Save an adapter that is frozen and active beside the one that is trained: before and after, and what moved."""
    before = folder / f"saved{rank}" / "adapter.safetensors"
    model = tunerkit.load(zero_training.base(deepspeed, _JOB), before, adapter="frozen")
    tunerkit.wrap(model, "lora", _TARGETS, adapter="trained", seed=2)
    optimizer = zero_training.adam(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero_training.settings(_JOB))
    alone = answer(lambda: tunerkit.save(model, folder / "never", adapter="frozen"))
    tunerkit.attach(model, engine, total_steps=_JOB.steps)
    zero_training.take_steps(engine, range(_JOB.steps), rank)
    after = tunerkit.save(model, folder / "frozen", adapter="frozen")
    return {"alone": alone, "before": load_file(before), "after": load_file(after)}


def _gathered(deepspeed: Any) -> list[int]:
    """How many values wrapping gathers at a time."""
    sizes = []

    class Noting(deepspeed.zero.GatheredParameters):  # type: ignore[misc]  # a class that mypy does not see
        def __enter__(self) -> None:
            sizes.append(sum(parameter.ds_numel for parameter in self.params))
            super().__enter__()

    base = zero_training.base(deepspeed, _JOB)
    with mock.patch.object(deepspeed.zero, "GatheredParameters", Noting):
        tunerkit.wrap(base, "lora", _TARGETS)
    return sizes


def _told(deepspeed: Any) -> list[list[str]]:
    """The warnings of what is not adapted, by the shapes of parameters: for a whole base and for one in Init."""
    said = []
    for init in (False, True):
        base = nn.Sequential(nn.Linear(12, 8), Matrices(2, 8), Matrices(2, 8, 4))
        if init:
            deepspeed.zero.Init(module=base, config_dict_or_path=zero_training.settings(_JOB))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tunerkit.wrap(base, "lora", {"rank": 2, "targets": "all-linear"})
        said.append([str(each.message) for each in caught if issubclass(each.category, tunerkit.TunerkitWarning)])
    return said


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same adapter, bit by bit."""
    first, second = (dict(tunerkit.tuner(model).named_parameters()) for model in (one, other))
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _is_partitioned(model: nn.Module) -> bool:
    own = [parameter for name, parameter in model.named_parameters() if ".tunerkit." not in name]
    return all(parameter.numel() == 0 for parameter in own)


def answer(call: Callable[[], object]) -> str:
    """The error that a call raises; nothing if it raises none of tunerkit's."""
    try:
        call()
    except tunerkit.TunerkitError as error:
        return f"{type(error).__name__}: {error}"
    return ""
