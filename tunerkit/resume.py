"""Go on with a training: its state in a file of its own, and saved weights put back into live adapters."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from tunerkit import registry
from tunerkit.errors import FileError
from tunerkit.files import FILE_NAME, describe, file_at, fill, read, refuse_other_base, write
from tunerkit.header import Header, encode
from tunerkit.records import RankChange, State
from tunerkit.steps import optimizer_of
from tunerkit.tuner import Tuner
from tunerkit.tuner import tuner as find_tuner

STATE_NAME = "state.safetensors"


def save_state(model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None) -> Path:
    """Write what training needs to go on (importance averages, step, total), apart from the adapter's weights."""
    return save_tuner_state(find_tuner(model, adapter), path)


def load_state(model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None) -> None:
    """Restore what `save_state` wrote into an attached adapter: the next step continues the interrupted run.

    Raises `FileError` for a file that is damaged or of another run, and `StepError` if the method's state does not
    fit the adapter; nothing is changed then.
    """
    load_tuner_state(find_tuner(model, adapter), path)


def save_tuner_state(tuner: Tuner, path: str | os.PathLike[str]) -> Path:
    """`save_state` of one tuner."""
    state = tuner.training_state()
    target = file_at(path, STATE_NAME)
    history = [[change.step, change.budget, list(change.ranks.values())] for change in tuner.history]
    header = describe(tuner, kind="state", values=dict(state.values), history=history)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
    write(target, tensors, encode(header, tensors))
    return target


def load_tuner_state(tuner: Tuner, path: str | os.PathLike[str]) -> None:
    """`load_state` into one tuner."""
    source = file_at(path, STATE_NAME)
    tensors, header = read(source, kind="state")
    differing = _differences(header, describe(tuner, kind="state"))
    if registry.get(tuner.method).needs_steps and header.total_steps != tuner.total_steps:
        # A schedule is laid out over the whole training; one that is longer now would have pruned otherwise.
        differing.append(f"total_steps {header.total_steps} -> {tuner.total_steps}")
    _refuse_other_run(source, differing)
    history = [RankChange(step, budget, _by_target(ranks, header, source)) for step, budget, ranks in header.history]
    registry.call("tunerkit_restore", tuner.method, tuner=tuner, state=State(tensors=tensors, values=header.values))
    tuner.steps = header.steps
    tuner.history[:] = history


def restore_(tuner: Tuner, path: str | os.PathLike[str]) -> None:
    """Put the weights saved at ``path`` into the live adapter, of other ranks too: all of them, or an error.

    The Parameter objects stay. What an optimizer keeps for one that changed its shape is dropped: it belongs to
    another tensor now.
    """
    source = file_at(path, FILE_NAME)
    tensors, header = read(source, kind="adapter")
    _refuse_other_run(source, _differences(header, describe(tuner, kind="adapter")))
    refuse_other_base(tuner, header, source)
    slots = dict(tuner.slots())
    fill(copy.deepcopy(slots), tensors, source)  # whatever does not fit is told before anything live is touched
    shapes = {parameter: parameter.shape for parameter in tuner.parameters()}
    fill(slots, tensors, source)
    optimizer = optimizer_of(tuner)
    for parameter, shape in shapes.items():
        if optimizer is not None and parameter.shape != shape:
            optimizer.state.pop(parameter, None)
    tuner.steps = header.steps


def forget_state_(tuner: Tuner) -> None:
    """Let go of a training state that does not go with the weights that were just restored, and of what came later."""
    tuner.state = None
    tuner.history[:] = [change for change in tuner.history if change.step <= tuner.steps]


def _differences(saved: Header, own: Header) -> list[str]:
    """What a file says of its adapter and this one does not, ``saved -> here``; empty if they are of one run."""
    if saved.method != own.method:
        return [f"method {saved.method!r} -> {own.method!r}"]
    lines = [
        f"{name} {saved.config.get(name)!r} -> {own.config.get(name)!r}"
        for name in sorted({*saved.config, *own.config})
        if saved.config.get(name) != own.config.get(name)
    ]
    for what in ("targets", "copies", "biases"):
        one, other = getattr(saved, what), getattr(own, what)
        if one != other:
            lines.append(f"{len(one)} {what} -> {len(other)}, not the same ones")
    return lines


def _refuse_other_run(source: Path, differing: list[str]) -> None:
    if differing:
        listed = "\n".join(f"- {line}" for line in differing)
        raise FileError(f"{source} belongs to another run (saved -> here):\n{listed}")


def _by_target(ranks: object, header: Header, source: Path) -> Mapping[str, int]:
    if not isinstance(ranks, list) or len(ranks) != len(header.targets):
        raise FileError(f"{source}: its history does not have one rank per target")
    return dict(zip(header.targets, ranks, strict=True))
