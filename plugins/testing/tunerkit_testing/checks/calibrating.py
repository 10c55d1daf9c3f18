"""Checks of a start that is fitted to data."""

from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import hooks
from tunerkit_testing.cases import Case, Trial, assert_base_untouched
from tunerkit_testing.checks.probing import one_code_path
from tunerkit_testing.checks.start import assert_start


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
