"""Checks of a training that is saved and resumed in new objects."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import tunerkit
from tunerkit import injection
from tunerkit.plugin import State
from tunerkit_testing.cases import STEPS, Case, optimizer_of, wrapped
from tunerkit_testing.checks.probing import seeded


def check_resumes(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """Saved in the middle and resumed in a new model, a training ends bit for bit as without the interruption."""
    model, half = wrapped(case, method, config), STEPS // 2
    optimizer = _attached(model, case)
    _steps(model, case, optimizer, range(half))
    path = tunerkit.save(model, tmp_path / "adapter")
    tunerkit.save_state(model, tmp_path / "adapter")
    saved = copy.deepcopy(injection.training_state(tunerkit.tuner(model)))
    kept = copy.deepcopy(optimizer.state_dict())
    _steps(model, case, optimizer, range(half, STEPS))
    again = tunerkit.load(case.build(), path, trainable=True)
    fresh = _optimizer(again, case)
    fresh.load_state_dict(kept)
    tunerkit.attach(again, fresh, total_steps=STEPS)
    tunerkit.load_state(again, tmp_path / "adapter")
    _assert_same_state(injection.training_state(tunerkit.tuner(again)), saved)
    _steps(again, case, fresh, range(half, STEPS))
    _assert_same_end(again, model)


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


def _assert_same_end(found: nn.Module, expected: nn.Module) -> None:
    hint = (
        "return everything that later steps depend on from tunerkit_state, and set it again in tunerkit_restore: "
        "averages, masks, counters. What forward needs belongs into parameters and buffers"
    )
    one, other = tunerkit.tuner(found), tunerkit.tuner(expected)
    assert one.steps == other.steps, f"resumed, the training has {one.steps} steps instead of {other.steps}; {hint}"
    assert one.ranks() == other.ranks(), f"resumed, the ranks are others at the end; {hint}"
    assert one.history == other.history, f"resumed, the history of the ranks is another; {hint}"
    twin = dict(one.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, twin[name]), (
            f"resumed, {name} differs at the end by {float((parameter - twin[name]).detach().abs().max()):.3g}; {hint}"
        )


def _optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    return optimizer_of((p for p in model.parameters() if p.requires_grad), case.lr)


def _attached(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    optimizer = _optimizer(model, case)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    return optimizer


def _steps(model: nn.Module, case: Case, optimizer: torch.optim.Optimizer, steps: range) -> None:
    case.start_training(model)
    for step in steps:
        optimizer.zero_grad()
        seeded(case.loss, model, step).backward()
        optimizer.step()
