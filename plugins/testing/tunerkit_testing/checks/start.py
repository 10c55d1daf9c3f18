"""Checks of a wrapped model before training: it computes what the base does, and a seed draws the same again."""

from typing import Any
from unittest import SkipTest

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit_testing.cases import SEED, Case, Trial, assert_base_untouched, assert_same
from tunerkit_testing.checks.probing import (
    adapter_dtypes,
    base_output,
    meanwhile,
    one_code_path,
    outliving,
    own_parts,
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
