"""Go on with a training: its state in a file or in the optimizer's, and saved weights put back into live adapters."""

import copy
import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit import hooks
from tunerkit.errors import FileError, TunerkitWarning
from tunerkit.injection import Tuner
from tunerkit.injection import tuner as find_tuner
from tunerkit.records import RankChange, State
from tunerkit.serialization.adapter_file import FILE_NAME, fill, header_of, read, refuse_other_base
from tunerkit.serialization.header import Header, decode, encode
from tunerkit.serialization.safetensors_file import file_at, write
from tunerkit.steps import hold, optimizer_of

STATE_NAME = "state.safetensors"
# The entry of an optimizer's state_dict that holds training states by adapter name.
CARRIED = "tunerkit"


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
    target = file_at(path, STATE_NAME)
    tensors, metadata = _state_of(tuner)
    write(target, tensors, metadata)
    return target


def load_tuner_state(tuner: Tuner, path: str | os.PathLike[str]) -> None:
    """`load_state` into one tuner."""
    source = file_at(path, STATE_NAME)
    _go_on_(tuner, *read(source, content="state"), source=str(source))


def carry(tuner: Tuner, optimizer: Optimizer) -> None:
    """Let the training state travel in ``optimizer.state_dict()``, where each loop's own checkpoints take it along.

    The entry has a name of its own beside torch's, which an optimizer that nothing is attached to passes over.
    """
    hold(
        tuner,
        optimizer.register_state_dict_post_hook(functools.partial(_put_in, tuner)),
        optimizer.register_load_state_dict_pre_hook(functools.partial(_take_out, tuner)),
    )


def _put_in(tuner: Tuner, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    tensors, metadata = _state_of(tuner)
    # Copies: who keeps the state_dict in memory and trains on would find averages that their digest does not fit.
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    state_dict.setdefault(CARRIED, {})[tuner.name] = {"tensors": kept, "metadata": metadata}


def _take_out(tuner: Tuner, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    carried = state_dict.get(CARRIED, {}).get(tuner.name)
    if carried is not None:
        source = "the optimizer's state_dict"
        tensors: dict[str, Tensor] = carried["tensors"]
        _go_on_(tuner, tensors, decode(carried["metadata"], tensors, source=source, content="state"), source=source)
    elif state_dict["state"]:
        warnings.warn(
            f"the state_dict that the optimizer loads has no training state of adapter {tuner.name!r}, which was not "
            f"attached where it was taken: the schedule goes on from step {tuner.steps}. To resume a training, load "
            "its state with tunerkit.load_state",
            TunerkitWarning,
            stacklevel=4,
        )


def _state_of(tuner: Tuner) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a training state and what is said of them, as a file holds both."""
    state = tuner.training_state()
    history = [[change.step, change.budget, list(change.ranks.values())] for change in tuner.history]
    header = header_of(tuner, content="state", values=dict(state.values), history=history)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
    return tensors, encode(header, tensors)


def _go_on_(tuner: Tuner, tensors: Mapping[str, Tensor], header: Header, *, source: str) -> None:
    differing = _differences(header, header_of(tuner, content="state"))
    if tuner.needs_steps and header.total_steps != tuner.total_steps:
        # A schedule is laid out over the whole training; one that is longer now would have pruned otherwise.
        differing.append(f"total_steps {header.total_steps} -> {tuner.total_steps}")
    _refuse_other_run(source, differing)
    history = [RankChange(step, budget, _by_target(ranks, header, source)) for step, budget, ranks in header.history]
    hooks.restore(tuner, State(tensors=tensors, values=header.values))
    tuner.progress.steps = header.steps
    tuner.progress.history[:] = history


def restore_(tuner: Tuner, path: str | os.PathLike[str]) -> None:
    """Put the weights saved at ``path`` into the live adapter, of other ranks too: all of them, or an error.

    The Parameter objects stay. What an optimizer keeps for one that changed its shape is dropped: it belongs to
    another tensor now.
    """
    source = file_at(path, FILE_NAME)
    tensors, header = read(source, content="adapter")
    _refuse_other_run(str(source), _differences(header, header_of(tuner, content="adapter")))
    refuse_other_base(tuner, header, source)
    slots = dict(tuner.slots())
    fill(copy.deepcopy(slots), tensors, source)  # whatever does not fit is told before anything live is touched
    shapes = {parameter: parameter.shape for parameter in tuner.parameters()}
    fill(slots, tensors, source)
    optimizer = optimizer_of(tuner)
    for parameter, shape in shapes.items():
        if optimizer is not None and parameter.shape != shape:
            optimizer.state.pop(parameter, None)
    tuner.progress.steps = header.steps


def forget_state_(tuner: Tuner) -> None:
    """Let go of a training state that does not go with the weights that were just restored, and of what came later."""
    tuner.progress.state = None
    tuner.progress.history[:] = [change for change in tuner.history if change.step <= tuner.steps]


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


def _refuse_other_run(source: str, differing: list[str]) -> None:
    if differing:
        listed = "\n".join(f"- {line}" for line in differing)
        raise FileError(f"{source} belongs to another run (saved -> here):\n{listed}")


def _by_target(ranks: object, header: Header, source: str) -> Mapping[str, int]:
    if not isinstance(ranks, list) or len(ranks) != len(header.targets):
        raise FileError(f"{source}: its history does not have one rank per target")
    return dict(zip(header.targets, ranks, strict=True))
