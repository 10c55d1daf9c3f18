"""Checks of a wrapped model before training: it is the base model, also where all adapters share a module."""

from typing import Any
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit.injection import slots_of
from tunerkit_testing.cases import SEED, Case, Trial, assert_base_untouched, assert_same, train
from tunerkit_testing.checks.probing import (
    adapter_dtypes,
    base_output,
    filled,
    meanwhile,
    one_code_path,
    outliving,
    own_parts,
    shared_in,
)
from tunerkit_testing.counting import Counting


def check_building_keeps_the_base(trial: Trial) -> None:
    """`wrap` returns the same object and keeps every name, type and value of the base."""
    model = trial.build()
    assert tunerkit.wrap(model, trial.method, trial.settings, seed=0) is model
    assert_base_untouched(model, trial.case, "only read the base layer in tunerkit_build_adapter, do not write to it")


@one_code_path()
def check_start(trial: Trial) -> None:
    """The first output is bit-identical to the base's; within rounding if the method declares ``start="rounding"``."""
    assert_start(trial.wrapped().eval(), trial)


def assert_start(model: nn.Module, trial: Trial) -> None:
    """Assert that the output of a wrapped model is what its method declares of the start; it is frozen for that."""
    found, expected = trial.output(model.requires_grad_(False)), base_output(trial)
    hint = "choose initial values with which the adapter adds nothing, such as a factor of 0"
    if hooks.registry.get(tunerkit.tuner(model).method).start == "rounding":
        assert_same(found, expected, "the start against the base", hint, adapters=adapter_dtypes(model))
        return
    worst = float((found - expected).abs().max())
    assert torch.equal(found, expected), (
        f"the adapter changes the first output by {worst:.3g}; {hint}, or declare Method(..., start='rounding') if the "
        "difference is rounding alone"
    )


def check_seed(trial: Trial) -> None:
    """The same seed gives the same adapter, also on a base of another dtype, whatever was drawn before.

    Another seed gives another adapter, unless nothing is drawn for it, or a setting is called seed or key.
    """
    first, noted = _built(trial)
    lasting = outliving(first)
    torch.rand(3)
    second, again = _built(trial)
    cause = (
        "what was drawn is the same, so something counts or remembers that outlives an adapter: let its start depend "
        "on no class attribute, no global and nothing in the plugin"
        if noted.drawn == again.drawn
        else "draw from torch's random state, which wrap seeds, and from no generator that goes on from one adapter to "
        "the next"
    )
    assert_same_start(first, second, f"drawn twice with one seed; {cause}", meanwhile(lasting, second))
    if noted.seeded:
        _assert_seeded(first, trial)
    adapters = tunerkit.tuner(first).adapters().values()
    if any(adapter.reads_weight for adapter in adapters):
        return  # the start may depend on the weight, which is rounded
    other = trial.in_dtype(torch.bfloat16).wrapped()
    where = "on a base in bfloat16; build it on the CPU in the default dtype, and not in the base's"
    assert_same_start(first, other, f"{where} (if it depends on the weight, set reads_weight = True)")


def _built(trial: Trial, seed: int = SEED) -> tuple[nn.Module, Counting]:
    """Return a wrapped model, and what was drawn for its adapter."""
    model = trial.build()
    with Counting() as counting:
        tunerkit.wrap(model, trial.method, trial.settings, seed=seed)
    return model, counting


def _assert_seeded(first: nn.Module, trial: Trial) -> None:
    """Assert that the seed of `tunerkit.wrap` changes some tensor of the file, unless the method has its own seed."""
    fields = attrs.fields(hooks.registry.get(trial.method).config)
    if any({"seed", "key"} & {*field.name.split("_")} for field in fields):
        return
    other = own_parts(_built(trial, SEED + 1)[0])
    pairs = [
        (tensor, other[name].state_dict()[key])
        for name, part in own_parts(first).items()
        for key, tensor in part.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.numel() and bool((tensor != tensor.flatten()[0]).any())
    ]
    assert not pairs or not all(torch.equal(one, two) for one, two in pairs), (
        "another seed=... of wrap gives the same adapter, though random numbers are drawn for it: they come from a "
        "generator with a fixed seed; draw from torch's random state, which wrap seeds, or let the config have that "
        "seed as a setting that is called seed or key"
    )


def assert_same_start(one: nn.Module, other: nn.Module, what: str, first: str = "") -> None:
    """Assert that two models have the same adapters, bit for bit; a message begins with ``first``."""
    found = dict(tunerkit.tuner(other).adapters())
    for path, adapter in tunerkit.tuner(one).adapters().items():
        twin = found[path].state_dict()
        for name, tensor in adapter.state_dict().items():
            assert torch.equal(tensor, twin[name]), f"{first}{path}: {name} differs {what}"


# --- A start that is fitted to data -----------------------------------------------------------------------------------


@one_code_path()
def check_calibration_keeps_the_start(trial: Trial) -> None:
    """After `tunerkit.calibrate` the output is what the method declares of its start, and the base is as before."""
    # Modules that are trained in full would be fitted to the batches first, which changes the output.
    model = trial.but(train_modules=()).wrapped().eval()
    if hooks.statistics(tunerkit.tuner(model)) is None:
        raise SkipTest("the method asks for no statistics")
    tunerkit.calibrate(model, [batch_of(model, trial.case)] * 2, loss=loss_of)
    assert_start(model, trial)
    assert_base_untouched(model, trial.case, "only change the adapters in tunerkit_calibrate")
    for name, parameter in tunerkit.tuner(model).named_parameters():
        assert bool(parameter.isfinite().all()), f"{name} contains NaN or inf after calibrating"


def batch_of(model: nn.Module, case: Case) -> Any:
    """Return the arguments with which a case calls its model."""
    seen: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs if kwargs else args)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        case.loss(model)
    finally:
        handle.remove()
    return seen[0]


def loss_of(output: Any, batch: Any) -> Tensor:
    """A loss that the output itself has, or else its mean square: calibrating needs any."""
    found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
    return torch.square(tensor).mean()


# --- A module that all adapters share, which `tunerkit_shared` built --------------------------------------------------


def check_shared_module_kept(trial: Trial) -> None:
    """Building the adapters changes nothing of the shared module, and training nothing that it keeps fixed."""
    model = trial.wrapped()
    shared = _shared(model)
    returned = _tensors(_returned(model))  # the same names: `wrap` refuses others
    for name, tensor in _tensors(shared).items():
        assert torch.equal(tensor, returned[name].to(tensor)), (
            f"{name} of the shared module is not what tunerkit_shared returns with the same seed; only read it in "
            "tunerkit_build_adapter, and draw it from torch's random state"
        )
    fixed = _fixed(shared)
    before = {name: tensor.clone() for name, tensor in fixed.items()}
    train(model, trial.case)
    for name, tensor in fixed.items():
        assert torch.equal(tensor, before[name]), (
            f"{name} of the shared module changed in training; only read it in forward and in the hooks"
        )


@torch.no_grad()
def check_shared_module_used(trial: Trial) -> None:
    """The output depends on the shared module, which is the only one: no adapter has a copy of it."""
    model = filled(trial)
    shared = _shared(model)
    before = trial.output(model)
    tensors = _tensors(shared)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.mul_(1.5)
    assert not torch.equal(trial.output(model), before), (
        "the output does not depend on the shared module; read it as self.shared in forward, and do not copy it"
    )
    held = {id(tensor) for tensor in tensors.values()}
    for path, adapter in tunerkit.tuner(model).adapters().items():
        twice = [name for name, tensor in _tensors(adapter).items() if id(tensor) in held]
        assert not twice, f"{path}: {', '.join(twice)} is a tensor of the shared module too; read it as self.shared"


def _shared(model: nn.Module) -> nn.Module:
    shared = shared_in(tunerkit.tuner(model))
    if shared is None:
        raise SkipTest("the method's adapters share no module")
    return shared


def _returned(model: nn.Module) -> nn.Module:
    """What `tunerkit_shared` returns before any adapter is built, with the seed that ``model`` was wrapped with."""
    tuner = tunerkit.tuner(model)
    found = [slots_of(target.module) for target in tuner.targets]
    bases = [slots.base for slots in found if slots is not None and slots.base is not None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        spec = hooks.specs.tunerkit_shared
        shared = hooks.ask(spec, tuner.method, targets=tuner.targets, bases=bases, config=tuner.config)
    assert shared is not None
    return shared


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _fixed(shared: nn.Module) -> dict[str, Tensor]:
    """Buffers, and parameters that are not trained."""
    return {name: tensor for name, tensor in _tensors(shared).items() if not tensor.requires_grad}
