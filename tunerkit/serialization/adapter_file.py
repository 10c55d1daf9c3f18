"""Write an adapter to one safetensors file and read it back: the way in is the way of `wrap`, entered again."""

import os
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.config import unstructure
from tunerkit.errors import AdapterError, BaseMismatchError, FileError, TargetError, TunerkitWarning
from tunerkit.injection import (
    Progress,
    Slot,
    Tuner,
    build,
    inject_,
    ready_model,
    refuse_lost,
)
from tunerkit.injection import tuner as find_tuner
from tunerkit.serialization.fingerprint import differences, fingerprint
from tunerkit.serialization.header import Header, decode, encode
from tunerkit.serialization.safetensors_file import file_at, write
from tunerkit.steps import watch_optimizers
from tunerkit.targets import Scan, from_paths, refuse_tied, refuse_unfit, scan

FILE_NAME = "adapter.safetensors"
_WRITTEN_BY = {
    "adapter": f"tunerkit.save writes {FILE_NAME}",
    "state": "tunerkit.save_state writes state.safetensors",
}
M = TypeVar("M", bound=nn.Module)


def save(model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None) -> Path:
    """Write one adapter of ``model`` and return the file's path.

    A folder (made if missing) gets ``adapter.safetensors``; a path ending in ``.safetensors`` is the file. An
    existing file is replaced in one move: readers see the old one or the new one.

    Raises `AdapterError` for a method that needs steps and had none, for an adapter whose weights are offloaded, and
    if adapted modules were replaced or resized after wrapping: no base would fit the file.
    """
    tuner = find_tuner(model, adapter)
    if tuner.needs_steps and tuner.steps == 0 and not tuner.loaded:
        raise AdapterError(
            f"adapter {tuner.name!r} was trained with no step: method {tuner.method!r} allocates ranks while the "
            "optimizer steps. Call tunerkit.attach(model, optimizer, total_steps=...) before training"
        )
    warn_of_unspent_schedule(tuner)
    return save_tuner(tuner, path)


def save_tuner(tuner: Tuner, path: str | os.PathLike[str]) -> Path:
    """`save` of one tuner as it stands, wherever it is in its schedule: a checkpoint."""
    refuse_lost([tuner])
    tensors = adapter_tensors(tuner)
    target = file_at(path, FILE_NAME)
    write(target, tensors, encode(header_of(tuner, content="adapter"), tensors))
    return target


def load(base: M, path: str | os.PathLike[str], *, adapter: str = "default", trainable: bool = False) -> M:
    """Put the adapter saved at ``path`` into ``base``, in place, and return the same object.

    Raises `FileError` (damaged, foreign, missing or unexpected tensors), `BaseMismatchError`, `TargetError` (a
    target's weight is tied or on meta), `AdapterError`, `UnknownMethodError`, `ConfigError`; everything wrong is
    named at once and nothing is loaded then.
    """
    root = ready_model(base, adapter)
    source = file_at(path, FILE_NAME)
    tensors, header = read(source, content="adapter")
    scanned = scan(root, hooks.gather_knowledge())
    tuner = _tuner_from(header, scanned, adapter, source)
    refuse_other_base(tuner, header, source, scanned)
    with torch.random.fork_rng(devices=[]):  # the start is overwritten; the caller's random state is not touched
        slots = build(scanned, tuner)
    fill(slots, tensors, source)
    inject_(tuner, slots, scanned, trainable=trainable)
    watch_optimizers(tuner.method)
    return base


def warn_of_unspent_schedule(tuner: Tuner) -> None:
    """Tell of ranks that are still above their final budget: fine for a checkpoint, a surprise at the end."""
    if tuner.steps == 0 or tuner.total_steps is None:
        return
    # Without the hook the budget is what the ranks are, now as at the end; to count them takes a while.
    final = hooks.budget(tuner, tuner.total_steps)
    if final is not None and tuner.budget() > final:
        warnings.warn(
            f"adapter {tuner.name!r} stands at step {tuner.steps} of {tuner.total_steps} with a budget of "
            f"{tuner.budget()}, above the final {final}; if training is over, call tuner.finish() before it is saved",
            TunerkitWarning,
            stacklevel=3,
        )


def adapter_tensors(tuner: Tuner) -> dict[str, Tensor]:
    """Everything the adapter's file holds, by ``<path of the module>.<name in the slot>``."""
    tensors = {
        f"{path}.{name}" if path else name: tensor.detach().contiguous()
        for path, slot in tuner.slots()
        for name, tensor in slot.state_dict().items()
    }
    away = [name for name, tensor in tensors.items() if tensor.is_meta]
    if away:
        raise AdapterError(
            f"adapter {tuner.name!r} is on the meta device ({away[0]}, ...), so there is nothing to save: if "
            "accelerate offloads it, call accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    return tensors


def header_of(
    tuner: Tuner, *, content: str, values: dict[str, object] | None = None, history: list[list[object]] | None = None
) -> Header:
    """The header for a file of ``tuner``."""
    owner = hooks.registry.owner_of(tuner.method)
    versions = {"tunerkit": metadata.version("tunerkit"), "torch": torch.__version__, owner.distribution: owner.version}
    base: dict[str, dict[str, Any]] = {}
    if content == "adapter":
        base = tuner.progress.fingerprint or fingerprint(tuner)
    return Header(
        kind=content,
        method=tuner.method,
        config=unstructure(tuner.config.settled()),
        targets=[target.path for target in tuner.targets],
        copies=[place.path for place in tuner.copies],
        biases=[place.path for place in tuner.biases],
        steps=tuner.steps,
        total_steps=tuner.total_steps,
        versions=versions,
        base=base,
        values=values or {},
        history=history or [],
    )


def read(path: Path, *, content: str) -> tuple[dict[str, Tensor], Header]:
    """The tensors and the checked header of a tunerkit file. Raises `FileError`."""
    if not path.is_file():
        raise FileError(f"there is no file {path}; {_WRITTEN_BY[content]} into the folder it is given")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as a safetensors file: {error}") from error
    return tensors, decode(found, tensors, source=str(path), content=content)


def _tuner_from(header: Header, scanned: Scan, adapter: str, source: Path) -> Tuner:
    try:
        places = from_paths(scanned, [*header.targets, *header.copies, *header.biases])
    except TargetError as error:
        raise BaseMismatchError(f"{source} was trained on another base: {error}") from error
    by_path = {place.path: place for place in places}
    refuse_unfit(scanned, [by_path[path] for path in header.targets])
    refuse_tied(scanned, header.copies)
    return Tuner(
        name=adapter,
        method=header.method,
        config=hooks.structure(header.method, header.config),
        model=scanned.root.module,
        targets=tuple(by_path[path] for path in header.targets),
        copies=tuple(by_path[path] for path in header.copies),
        biases=tuple(by_path[path] for path in header.biases),
        loaded=True,
        progress=Progress(total_steps=header.total_steps),
    )


def refuse_other_base(tuner: Tuner, header: Header, source: Path, scanned: Scan | None = None) -> None:
    """Raise `BaseMismatchError` if the base under ``tuner`` is not the one that the file tells of."""
    lines = differences(header.base, fingerprint(tuner, scanned))
    if lines:
        listed = "\n".join(f"- {line}" for line in lines)
        raise BaseMismatchError(f"{source} was trained on another base model:\n{listed}")


def fill(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy the file's tensors into ``slots``; every misfit is named at once, and those that fit are filled by then."""
    problems: list[str] = []
    used: set[str] = set()
    for path, slot in slots.items():
        prefix = f"{path}." if path else ""
        names = {name: prefix + name for name in slot.state_dict()}
        used.update(names.values())
        missing = [full for full in names.values() if full not in tensors]
        problems += [f"missing: {full}" for full in missing]
        if not missing:
            problems += _load_slot(path, slot, {name: tensors[full] for name, full in names.items()})
    problems += [f"unexpected: {name}" for name in tensors if name not in used]
    if problems:
        raise FileError(f"{source} does not fit its own header:\n" + "\n".join(f"- {line}" for line in problems))


def _load_slot(path: str, slot: Slot, tensors: dict[str, Tensor]) -> list[str]:
    try:
        slot.load_state_dict(tensors)
    except RuntimeError as error:  # torch reports misfits of shape so
        return [f"at {path}: {line.strip()}" for line in str(error).splitlines()[1:]]
    return []
