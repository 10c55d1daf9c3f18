"""Checks of a training that is saved and resumed in new objects."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from unittest import SkipTest

import torch
from torch import nn

import tunerkit
from tunerkit import hooks, injection
from tunerkit.errors import TunerkitError
from tunerkit.plugin import State
from tunerkit_testing.blaming import changed, values_in
from tunerkit_testing.cases import STEPS, Trial, optimizer_of
from tunerkit_testing.checks.probing import (
    layers_of,
    outliving,
    own_parts,
    some,
    take_steps_,
    trained_parameters,
    unregistered,
)
from tunerkit_testing.checks.training import STEP_HOOKS, assert_held, not_in
from tunerkit_testing.small import trainable


def check_resumes(trial: Trial) -> None:
    """Saved in the middle and resumed in a new model, a training ends bit for bit as without the interruption."""
    _assert_resumes(trial, STEPS // 2, STEPS)


def check_resumes_late(trial: Trial) -> None:
    """On one layer, a training of 200 steps that is saved after 8 ends as without the interruption, bit for bit.

    What steps keep may have an effect only after many of them.
    """
    if not any(hooks.implements(hook, trial.method) for hook in STEP_HOOKS):
        raise SkipTest("the method does nothing in steps: it implements no hook of them")
    _assert_resumes(next(filter(_trains, layers_of(trial))), 8, 200)


def _trains(layer: Trial) -> bool:
    with suppress(TunerkitError):
        return bool(trained_parameters(tunerkit.tuner(layer.wrapped())))
    return False


def _assert_resumes(trial: Trial, half: int, steps: int) -> None:
    model = trial.wrapped()
    optimizer = optimizer_of(trainable(model), trial.lr)
    tunerkit.attach(model, optimizer, total_steps=steps)
    take_steps_(model, trial, optimizer, range(half))
    path = tunerkit.save(model, trial.folder / "adapter")
    tunerkit.save_state(model, trial.folder / "adapter")
    saved = copy.deepcopy(injection.training_state(tunerkit.tuner(model)))
    kept, remembered = copy.deepcopy(optimizer.state_dict()), _remembered(model)
    take_steps_(model, trial, optimizer, range(half, steps))
    assert_held(not_in(optimizer, tunerkit.tuner(model)), steps)
    again = tunerkit.load(trial.build(), path, trainable=True)
    fresh = optimizer_of(trainable(again), trial.lr)
    fresh.load_state_dict(kept)
    tunerkit.attach(again, fresh, total_steps=steps)
    tunerkit.load_state(again, trial.folder / "adapter")
    _assert_same_state(injection.training_state(tunerkit.tuner(again)), saved)
    lost = changed(remembered, _remembered(again))
    take_steps_(again, trial, fresh, range(half, steps))
    _assert_same_end(again, model, lost)


def _remembered(model: nn.Module) -> dict[str, object]:
    """Copy what steps may have kept, by name: in the tuner, in adapters, and elsewhere."""
    tuner = tunerkit.tuner(model)
    found = dict(values_in(tuner.state, "tuner.state"))
    for path, part in own_parts(model).items():
        found.update({f"{name} of the adapter at {path!r}": value for name, value in unregistered(part)})
    return {**outliving(model), **found}


def _assert_same_state(found: State, saved: State) -> None:
    """What was restored must be what was saved, also where the rest of a short training does not depend on it."""
    values = [name for name, value in saved.values.items() if found.values.get(name) != value]
    tensors = [
        name
        for name, tensor in saved.tensors.items()
        if name not in found.tensors or not torch.equal(found.tensors[name].cpu(), tensor.cpu())
    ]
    wrong = [*values, *tensors]
    assert not wrong, (
        f"after load_state, tunerkit_state returns other values than were saved: {', '.join(wrong[:5])}; set "
        "everything that it returns again in tunerkit_restore"
    )


def _assert_same_end(found: nn.Module, expected: nn.Module, lost: Sequence[str]) -> None:
    hint = (
        "return everything that later steps depend on from tunerkit_state, and set it again in tunerkit_restore: "
        "averages, masks, counters. What forward needs belongs into parameters and buffers"
    ) + (f". After load_state these were others than at save_state: {some(lost)}" if lost else "")
    one, other = tunerkit.tuner(found), tunerkit.tuner(expected)
    assert one.steps == other.steps, f"resumed, the training has {one.steps} steps instead of {other.steps}; {hint}"
    assert one.ranks() == other.ranks(), f"resumed, the ranks are others at the end; {hint}"
    assert one.history == other.history, f"resumed, the history of the ranks is another; {hint}"
    twin = dict(one.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, twin[name]), (
            f"resumed, {name} differs at the end by {float((parameter - twin[name]).detach().abs().max()):.3g}; {hint}"
        )
