"""Interrupts a call in the middle, as Ctrl-C does, at a chosen line of tunerkit's own source."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import tunerkit
from tunerkit.injection import walk

_SOURCE = str(Path(tunerkit.__file__).parent)


def interrupt(call: Callable[[], object], *, after: str, at: int | None = None) -> int:
    """Interrupt at line ``at`` (None: nowhere) from the first call of ``after``; returns how many lines ran."""
    lines = 0
    counting = False

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines, counting
        if not frame.f_code.co_filename.startswith(_SOURCE):
            return None
        counting = counting or frame.f_code.co_name == after
        lines += counting and event == "line"
        if lines == at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


def state_of(model: Any) -> dict[str, Any]:
    """Everything in a model that an interrupted call could leave half done, comparable between two models."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    return {
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "hooks": {name: [len(vars(module)[table]) for table in tables] for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "buffers": [name for name, _ in model.named_buffers()],
        "adapters": list(tunerkit.adapters(model)),
        "slots": [(path, slots.active, slots.enabled, slots.merged, slots.permanent) for path, _, slots in walk(model)],
    }


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results of `state_of` are equal, bit for bit."""
    values, others = one["values"], other["values"]
    return {**one, "values": list(values)} == {**other, "values": list(others)} and all(
        torch.equal(values[name], others[name]) for name in values
    )


def half_done(make: Callable[[], Any], call: Callable[[Any], object], *, after: str, points: int) -> list[int]:
    """The lines, of ``points`` tried, whose interrupt leaves a model neither as before nor as after ``call``."""
    whole = make()
    before = state_of(whole)
    total = interrupt(lambda: call(whole), after=after)
    done = state_of(whole)
    wrong = []
    for number in range(points):
        model, at = make(), 1 + number * (total - 1) // (points - 1)
        interrupt(lambda: call(model), after=after, at=at)  # noqa: B023  # called at once
        if not any(same_state(state_of(model), each) for each in (before, done)):
            wrong.append(at)
    return wrong
