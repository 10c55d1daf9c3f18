"""Resume training: save and load training states, also in an optimizer's state_dict, and restore weights in place."""

import copy
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit import hooks, injection, steps
from tunerkit.config import unstructure
from tunerkit.errors import AdapterError, ConfigError, FileError, StepError, TunerkitWarning, cut, first, shown, warn
from tunerkit.injection import Tuner, slots_in
from tunerkit.layers import torch_private
from tunerkit.paths import few
from tunerkit.records import RankChange, State
from tunerkit.serialization.adapter_file import header_of, write_own, written_once
from tunerkit.serialization.fingerprint import base_values, refuse_other_base
from tunerkit.serialization.header import Header, decode, encode, read
from tunerkit.serialization.safetensors_file import file_at
from tunerkit.serialization.tensor_checks import fill, refuse_nonfinite

# The key in an optimizer's state_dict for the training states by adapter name.
CARRIED = "tunerkit"


def save_state(model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None) -> Path:
    """Write an adapter's training state: importance averages, masks, history and step count, but not the weights.

    Args:
        model: The wrapped model, with the adapter attached.
        path: A folder, which gets ``state.safetensors`` and is created if it is missing; or a file, if the path ends in
            ``.safetensors``.
        adapter: The adapter's name. It may be left out if the model has only one.

    Returns:
        The file's path.

    Raises:
        FileError: The file cannot be written, JSON cannot hold a value of the state, or the path is a safetensors file
            of another program. An older file is unchanged.
        AdapterError: There is no such adapter, a method with a schedule was never attached, or the state contains NaN
            or inf.
    """
    tuner = injection.tuner(model, adapter)
    if injection.needs_steps(tuner) and tuner.progress.link is None and tuner.state is None and tuner.steps == 0:
        raise AdapterError(
            f"adapter {tuner.name!r} was never attached, so it has no training state to save: call "
            "tunerkit.attach(model, optimizer, total_steps=...) before training"
        )
    place, (tensors, header) = file_at(path, "state"), _state_of(tuner)

    def write() -> Path:
        then = "Nothing was written, and an older file is unchanged; resume from a state saved earlier"
        refuse_nonfinite(tensors, {}, f"the training state of adapter {tuner.name!r}", then, AdapterError)
        return write_own(tuner, place, header, tensors)

    return written_once(tuner, place, write)


def load_state(model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None) -> None:
    """Load a training state that `save_state` wrote. The next step resumes the interrupted training.

    If this raises, nothing is changed.

    Args:
        model: The wrapped model, with the saved weights and with the adapter attached.
        path: The file, or the folder that contains ``state.safetensors``.
        adapter: The adapter's name. It may be left out if the model has only one.

    Raises:
        FileError: The file is missing, damaged, inconsistent or from another run, or contains NaN or inf.
        StepError: The method's state does not fit the adapter.
        AdapterError: There is no such adapter.
    """
    tuner = injection.tuner(model, adapter)
    source, tensors, header = read(path, content="state")
    refuse_nonfinite(tensors, {}, source)
    _resume_(tuner, tensors, header, source)
    with tuner.whole():
        untrained = header.steps > 0 and injection.is_untrained(tuner)
    if untrained:
        warn(
            f"{source} resumes training at step {header.steps}, but the matrices of adapter {tuner.name!r} are "
            "untrained and add nothing: load its weights too, with tunerkit.load(base, path, trainable=True) before "
            "attach"
        )


def carry(tuner: Tuner, optimizer: Optimizer) -> None:
    """Add the training state to ``optimizer.state_dict()`` under the key `CARRIED`, so that checkpoints contain it."""
    steps.hold(
        tuner,
        optimizer.register_state_dict_post_hook(functools.partial(_put_in, tuner)),
        optimizer.register_load_state_dict_pre_hook(functools.partial(_take_out, tuner)),
    )


def _put_in(tuner: Tuner, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    tensors, header = _state_of(tuner)
    # Clone: training may continue while the state_dict stays in memory, and its digest must fit its tensors.
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    state_dict.setdefault(CARRIED, {})[tuner.name] = {"tensors": kept, "metadata": encode(header, kept)}


def _take_out(tuner: Tuner, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    source, name = "the optimizer's state_dict", f"adapter {tuner.name!r}"
    match state_dict.get(CARRIED, {}).get(tuner.name):
        case {"tensors": dict(tensors), "metadata": dict(metadata)}:
            _resume_(tuner, tensors, decode(metadata, tensors, source=source, content="state"), source)
            return
        case None if torch_private.in_distributed_checkpoint():
            text = (
                f"torch's distributed checkpoint does not keep the training state of {name}, so the schedule restarts "
                "at step 0. To resume, write it with tunerkit.save_state beside the checkpoint, and call "
                "tunerkit.load_state before the optimizer's state is set"
            )
            is_lost = not tuner.steps
        case None:
            text = (
                f"the optimizer's state_dict has no training state of {name}, since the adapter was not attached when "
                f"the state_dict was saved: the schedule restarts at step {tuner.steps}. To resume instead, load the "
                "training state with tunerkit.load_state"
            )
            is_lost = bool(state_dict["state"])
        case _:
            raise FileError(f"{source} has a damaged training state of {name}; load an earlier one")
    if is_lost:
        warnings.warn(text, TunerkitWarning, stacklevel=4)  # at the caller of `load_state_dict`, past torch's frames


def _state_of(tuner: Tuner) -> tuple[Mapping[str, Tensor], Header]:
    """Return the tensors of the training state, and the header for a file with these tensors."""
    state = injection.training_state(tuner)
    history = tuple([change.step, change.budget, list(change.ranks.values())] for change in tuner.history)
    return state.tensors, header_of(tuner, content="state", values=dict(state.values), history=history)


def _resume_(tuner: Tuner, tensors: Mapping[str, Tensor], header: Header, source: str) -> None:
    _refuse_other_run(tuner, header, source)
    with _all_or_nothing(tuner):
        # Set first, so that the method can compare its state with them.
        tuner.progress.steps = header.steps
        tuner.progress.history[:] = [
            RankChange(step, budget, dict(zip(header.targets, ranks, strict=True)))
            for step, budget, ranks in header.history
        ]
        # The plugin's errors cannot name the file, so it is added to them.
        try:
            with injection.as_hooks_see_it(tuner):
                state = State(tensors=tensors, values=header.values)
                hooks.ask(hooks.specs.tunerkit_restore, tuner.method, tuner=tuner, state=state)
        except (FileError, StepError) as error:
            raise type(error)(f"{source}: {error}") from error
        except Exception as error:
            error.add_note(
                f"while restoring {source}. Load a state that was saved together with the adapter's weights; without "
                "one, the schedule restarts"
            )
            raise
        recorded, found = tuner.history[-1].ranks if tuner.history else {}, tuner.ranks()
        if wrong := [f"{path} {rank} -> {found[path]}" for path, rank in recorded.items() if found[path] != rank]:
            raise FileError(
                f"{source} is inconsistent: ranks of its last allocation differ from those in its state (allocation -> "
                f"state): {few(wrong, shown=5)}; load an earlier file"
            )


@contextmanager
def _all_or_nothing(tuner: Tuner) -> Iterator[None]:
    """Roll back an adapter's tensors, state, steps and history if the block raises; Parameter objects stay the same."""
    progress, model = tuner.progress, tuner.model
    slots = [(slot, {name: value.clone() for name, value in slot.state_dict().items()}) for _, slot in slots_in(tuner)]
    # The copied state must refer to the live model, not to a copy of it.
    live = [tuner, steps.optimizer_of(tuner), *model.modules(), *model.parameters(), *model.buffers()]
    state = copy.deepcopy(tuner.state, {id(part): part for part in live})
    count, history = progress.steps, list(progress.history)

    def put_back_() -> None:
        for slot, values in slots:
            with torch.no_grad():
                slot.load_state_dict(values)
        tuner.state, progress.steps = state, count
        progress.history[:] = history

    with ExitStack() as undo:
        undo.callback(put_back_)
        yield
        undo.pop_all()


def restore_(tuner: Tuner, path: str | os.PathLike[str]) -> None:
    """Load the weights at ``path`` into the live adapter, which may have other ranks. If this raises, nothing changes.

    The Parameter objects stay the same. If a parameter's shape changes, its optimizer state is dropped.
    """
    source, tensors, header = read(path, content="adapter")
    _refuse_other_run(tuner, header, source)
    refuse_other_base(tuner, header, source)
    refuse_nonfinite(tensors, base_values(tuner), source)
    with tuner.whole(), _all_or_nothing(tuner):
        shapes = {parameter: parameter.shape for parameter in tuner.parameters()}
        fill(slots_in(tuner), tensors, tuner.model, source)
    optimizer = steps.optimizer_of(tuner)
    for parameter, shape in shapes.items():
        if optimizer is not None and parameter.shape != shape:
            optimizer.state.pop(parameter, None)
    tuner.progress.steps = header.steps


def _refuse_other_run(tuner: Tuner, saved: Header, source: str) -> None:
    """Raise `FileError` if the file's method, config, modules or, for a state, schedule differ from the adapter's."""
    own = header_of(tuner, content=saved.kind)
    if saved.method != own.method:
        lines = [f"method {shown(saved.method)} -> {own.method!r}"]
    else:
        earlier = saved.config
        if own.config.keys() - earlier:  # a setting that the file's version lacked had its default value
            kept = {name: value for name, value in own.config.items() if name in earlier}
            with suppress(ConfigError):  # a required setting is missing: the lines below name it
                earlier = {**unstructure(hooks.structure(own.method, kept).settled()), **earlier}
        settings = {name: (earlier.get(name), own.config.get(name)) for name in {*saved.config, *own.config}}
        lines = [
            f"{cut(name, 200)} {shown(there)} -> {shown(here)}"
            for name, (there, here) in sorted(settings.items())
            if there != here
        ]
        lines += [
            f"{len(there)} {what} -> {len(here)}{' at other paths' if len(there) == len(here) else ''}"
            for (what, there), here in zip(saved.places.items(), own.places.values(), strict=True)
            if there != here
        ]
    if saved.kind == "state" and injection.needs_steps(tuner) and saved.total_steps != own.total_steps:
        # The schedule spans the whole training, so with another length it would have pruned differently.
        lines.append(f"total_steps {saved.total_steps} -> {own.total_steps}")
    if lines:
        raise FileError("\n- ".join([f"{source} belongs to another run (saved -> here):", *first(lines)]))
