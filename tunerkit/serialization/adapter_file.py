"""Save an adapter to one safetensors file, and load it: loading repeats the steps of `wrap` with the file's choices."""

import os
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import attrs
import safetensors
import torch
from torch import Tensor, nn

from tunerkit import hooks, injection, libraries, steps, targets
from tunerkit.config import unstructure
from tunerkit.errors import AdapterError, BaseMismatchError, FileError, TargetError, TunerkitWarning
from tunerkit.injection import Progress, Slot, Tuner
from tunerkit.paths import join
from tunerkit.serialization.fingerprint import differences, fingerprint
from tunerkit.serialization.header import Header, decode, encode
from tunerkit.serialization.safetensors_file import file_at, write
from tunerkit.targets import Scan

# The public function that writes each kind of file.
_WRITERS = {"adapter": "save", "state": "save_state"}
M = TypeVar("M", bound=nn.Module)


def save(model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None) -> Path:
    """Write one adapter to a file.

    An existing file is replaced atomically: a reader sees the old file or the new one.

    Args:
        model: The wrapped model.
        path: A folder, which gets ``adapter.safetensors`` and is created if it is missing; or a file, if the path ends
            in ``.safetensors``.
        adapter: The adapter's name. It may be left out if the model has only one.

    Returns:
        The file's path.

    Raises:
        AdapterError: The method needs steps and the adapter was trained for none; its weights are offloaded; or adapted
            modules were replaced or resized after wrapping, so that no base model would fit the file; or FSDP or ZeRO-3
            holds the weights in shards.
        TargetError: The model was quantised by torchao after wrapping.
        FileError: The file cannot be written. An older file is unchanged then.
    """
    tuner = injection.tuner(model, adapter)
    if tuner.needs_steps and tuner.steps == 0 and not tuner.loaded:
        raise AdapterError(
            f"adapter {tuner.name!r} was trained with no step: method {tuner.method!r} allocates ranks while the "
            "optimizer steps. Call tunerkit.attach(model, optimizer, total_steps=...) before training"
        )
    warn_of_unspent_schedule(tuner)
    return save_tuner(tuner, path)


def save_tuner(tuner: Tuner, path: str | os.PathLike[str]) -> Path:
    """Write one adapter as it is now, at any point of its schedule. Checkpoints use this."""
    libraries.refuse_engine(tuner.model.named_modules(), "save")
    injection.refuse_lost([tuner])
    tensors = _tensors_of(tuner)
    kept = tuner.progress.fingerprint  # from before a permanent merge
    header = attrs.evolve(header_of(tuner, content="adapter"), base=kept or fingerprint(tuner))
    return write(file_at(path, "adapter"), tensors, encode(header, tensors))


def load(base: M, path: str | os.PathLike[str], *, adapter: str = "default", trainable: bool = False) -> M:
    """Put a saved adapter into a model, in place.

    If this raises, nothing is loaded. The error lists every problem.

    Args:
        base: The base model. It may already have other adapters.
        path: The file, or the folder that contains ``adapter.safetensors``.
        adapter: The name that the adapter gets: any text without "." or "/", up to 64 characters.
        trainable: Whether to train the adapter further. By default it is loaded for inference.

    Returns:
        The same object, with the adapter active in addition to those that are.

    Raises:
        FileError: The file is missing or damaged, tunerkit did not write it, or its tensors do not fit its header.
        BaseMismatchError: The adapter was trained on a different base model.
        TargetError: The weight of a target is tied, or on the meta device, or torchao has quantised the model.
        AdapterError: The name is taken or invalid, or the model cannot take an adapter now: it is merged, disabled,
            inside DDP, FSDP or ZeRO-3, a PeftModel, or running in another thread.
        UnknownMethodError: No installed plugin provides the method.
        ConfigError: The method rejects the config in the file.
    """
    root = injection.ready_model(base, adapter)
    source, tensors, header = read(path, content="adapter")
    scanned = targets.scan(root, hooks.gather_knowledge())
    tuner = _tuner_from(header, scanned, adapter, source)
    refuse_other_base(tuner, header, source, scanned)
    with torch.random.fork_rng(devices=[]):  # the file overwrites the initial values; keep the caller's random state
        slots = injection.build(scanned, tuner)
    fill(slots, tensors, source)
    injection.inject_(tuner, slots, scanned, trainable=trainable)
    steps.watch_optimizers(tuner.method)
    return base


def warn_of_unspent_schedule(tuner: Tuner) -> None:
    """Warn if the ranks are above their final budget: expected in a checkpoint, but not after training."""
    if tuner.steps == 0 or tuner.total_steps is None:
        return
    final = hooks.budget(tuner, tuner.total_steps)
    if final is not None and tuner.budget() > final:
        warnings.warn(
            f"adapter {tuner.name!r} is at step {tuner.steps} of {tuner.total_steps} with a budget of "
            f"{tuner.budget()}, above the final {final}; if training is over, call tuner.finish() before you save",
            TunerkitWarning,
            stacklevel=3,
        )


def _tensors_of(tuner: Tuner) -> dict[str, Tensor]:
    """Return all tensors of an adapter, by ``<path of the module>.<name in the slot>``."""
    tensors = {join(path, name): tensor for path, slot in tuner.slots() for name, tensor in slot.state_dict().items()}
    away = [name for name, tensor in tensors.items() if tensor.is_meta]
    if away:
        raise AdapterError(
            f"adapter {tuner.name!r} is on the meta device ({away[0]}, ...), so there is nothing to save: if "
            "accelerate offloads it, call accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    return tensors


def header_of(tuner: Tuner, *, content: str) -> Header:
    """Return the header for a file of ``tuner``, without the fields that only one kind of file fills in."""
    owner = hooks.registry.owner_of(tuner.method)
    versions = {"tunerkit": metadata.version("tunerkit"), "torch": torch.__version__, owner.distribution: owner.version}
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
        base={},
    )


def read(path: str | os.PathLike[str], *, content: str) -> tuple[str, dict[str, Tensor], Header]:
    """Return the file's own path, its tensors, and its header after all checks. Raises `FileError`."""
    source = file_at(path, content)
    if not source.is_file():
        raise FileError(
            f"there is no file {source}; tunerkit.{_WRITERS[content]} writes {content}.safetensors into the folder "
            "it is given"
        )
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            found = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{source} cannot be read as a safetensors file: {error}") from error
    return str(source), tensors, decode(found, tensors, source=str(source), content=content)


def _tuner_from(header: Header, scanned: Scan, adapter: str, source: str) -> Tuner:
    try:
        found = targets.from_paths(scanned, [*header.targets, *header.copies, *header.biases])
    except TargetError as error:
        raise BaseMismatchError(f"{source} was trained on another base: {error}") from error
    by_path = {place.path: place for place in found}
    chosen, copies, biases = (tuple(by_path[path] for path in paths) for paths in header.places.values())
    targets.refuse_unfit(scanned, chosen)
    targets.refuse_tied(scanned, header.copies)
    return Tuner(
        name=adapter,
        method=header.method,
        config=hooks.structure(header.method, header.config),
        model=scanned.root.module,
        targets=chosen,
        copies=copies,
        biases=biases,
        loaded=True,
        progress=Progress(total_steps=header.total_steps),
    )


def refuse_other_base(tuner: Tuner, header: Header, source: str, scanned: Scan | None = None) -> None:
    """Raise `BaseMismatchError` if the base under ``tuner`` differs from the fingerprint in the file."""
    lines = differences(header.base, fingerprint(tuner, scanned))
    if lines:
        raise BaseMismatchError("\n- ".join([f"{source} was trained on another base model:", *lines]))


def fill(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy the file's tensors into ``slots``.

    Raises `FileError` that lists all misfits at once; the slots that fit are filled by then.
    """
    problems: list[str] = []
    used: set[str] = set()
    for path, slot in slots.items():
        names = {name: join(path, name) for name in slot.state_dict()}
        used.update(names.values())
        missing = [f"missing: {full}" for full in names.values() if full not in tensors]
        problems += missing or _load_slot(path, slot, {name: tensors[full] for name, full in names.items()})
    problems += [f"unexpected: {name}" for name in tensors if name not in used]
    if problems:
        raise FileError("\n- ".join([f"{source} does not fit its own header:", *problems]))


def _load_slot(path: str, slot: Slot, tensors: dict[str, Tensor]) -> list[str]:
    try:
        slot.load_state_dict(tensors)
    except RuntimeError as error:  # torch's way to report wrong shapes
        return [f"at {path}: {line.strip()}" for line in str(error).splitlines()[1:]]
    return []
