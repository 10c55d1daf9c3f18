"""Save an adapter to one safetensors file, and load it: loading repeats the steps of `wrap` with the file's choices."""

import functools
import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from tunerkit import hooks, injection, libraries, patterns, steps, targets
from tunerkit.config import unstructure
from tunerkit.errors import BaseMismatchError, TargetError, TunerkitWarning
from tunerkit.injection import Progress, Tuner
from tunerkit.serialization.adopting import adopt, warn_of
from tunerkit.serialization.allocation_limit import limit_for
from tunerkit.serialization.base_check import base_values, describe_base, note_base, refuse_other_base
from tunerkit.serialization.before_saving import (
    refuse_diverged,
    refuse_shards,
    refuse_untrained,
    tensors_of,
    warn_of_unspent_schedule,
    warn_of_untrained,
)
from tunerkit.serialization.beside import beside_of, warn_of_lone
from tunerkit.serialization.fit import fill
from tunerkit.serialization.formats import format_at
from tunerkit.serialization.header import Header, encode
from tunerkit.serialization.reading import read, refuse_nonfinite, refuse_other_file
from tunerkit.serialization.safetensors_file import file_at, pack, write
from tunerkit.serialization.written_once import written_once
from tunerkit.targets import Scan

_RANKS = "ranks"  # the entry with the live ranks, from which `tunerkit show` tells them without the plugin
_CALIBRATION = "calibration"  # the entry of the header's ``values`` with the data that set the adapter's start
M = TypeVar("M", bound=nn.Module)


def save(
    model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None, allow_nonfinite: bool = False
) -> Path:
    """Write one adapter to a file.

    An older file of the adapter is replaced atomically: a reader sees the old file or the new one. The new file has its
    mode. An adapter that was never trained triggers a warning, and so does a base that is trained too or was resized:
    the file does not hold it.

    Args:
        model: The wrapped model.
        path: A folder, which gets ``adapter.safetensors`` and is created if it is missing; or a file, if the path ends
            in ``.safetensors``.
        adapter: The adapter's name. It may be left out if the model has only one.
        allow_nonfinite: Whether to write weights that contain NaN or inf, to examine them. `load` refuses such a file.

    Returns:
        The file's path.

    Raises:
        AdapterError: The method needs steps and the adapter was trained for none; its weights contain NaN or inf, or
            are offloaded, or are held in shards by FSDP or ZeRO-3; or adapted modules were replaced or resized after
            wrapping, so that no base model would fit the file. An older file is unchanged then.
        FileError: The file cannot be written, or there is a safetensors file that tunerkit did not write. An older file
            is unchanged then.
    """
    tuner = injection.tuner(model, adapter)
    refuse_untrained(tuner)
    warn_of_unspent_schedule(tuner)
    with tuner.whole():
        written = save_tuner(tuner, path, allow_nonfinite=allow_nonfinite)
        warn_of_untrained(tuner)
    injection.warn_of_base_changes([tuner])
    return written


def save_tuner(tuner: Tuner, path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> Path:
    """Write one adapter as it is now, at any point of its schedule. Checkpoints use this."""
    libraries.refuse_engine(injection.base_modules(tuner.model), "save")
    injection.refuse_lost([tuner])
    refuse_shards(tuner)
    place = file_at(path, "adapter")
    with tuner.whole():
        return written_once(tuner, place, functools.partial(_write, tuner, place, allow_nonfinite))


def _write(tuner: Tuner, place: Path, allow_nonfinite: bool) -> Path:
    refuse_other_file(place)
    tensors = tensors_of(tuner)
    if not allow_nonfinite:
        refuse_diverged(tuner, tensors)
    description = describe_base(tuner)
    if tuner.progress.calibration is not None:
        description["values"][_CALIBRATION] = tuner.progress.calibration
    description["values"][_RANKS] = tuner.ranks()
    header = header_of(tuner, content="adapter", **description)
    packed = pack(tensors)
    written = write(place, packed, encode(header, tensors, packed.stored))
    note_written(tuner, written, "adapter", stacklevel=8)
    return written


def note_written(tuner: Tuner, path: Path, content: str, *, stacklevel: int) -> None:
    """Note that ``path`` holds the adapter, or its state. Warn if it was the only such file of another one here."""
    file, own = os.path.realpath(path), tuner.progress.files
    for other in injection.tuners_of(tuner.model).values():
        held = other.progress.files
        if file not in own and [name for name, kind in held.items() if kind == content] == [file]:
            what, now = ("adapter", "") if content == "adapter" else ("the training state of adapter", "that of ")
            warnings.warn(
                f"{file} held {what} {other.name!r} of this model, and holds {now}{tuner.name!r} now. If you want "
                f"both, save {other.name!r} again, into a folder or under a file name of its own",
                TunerkitWarning,
                stacklevel=stacklevel,
            )
        if other is not tuner:
            held.pop(file, None)
    own[file] = content


def load(
    base: M,
    path: str | os.PathLike[str],
    *,
    adapter: str = "default",
    trainable: bool = False,
    check_config: bool = True,
) -> M:
    """Put a saved adapter into a model, in place.

    If this raises, nothing is loaded. The error lists every problem. A KeyboardInterrupt leaves the base unchanged too,
    unless it comes after the adapter is complete.

    Adapters of other programs are loaded too, if a plugin knows their format: tunerkit-peft reads PEFT's folders, and
    tunerkit-diffusers the files of diffusers and Kohya. One warning says what such an adapter lost on its way.

    Args:
        base: The base model. It may already have other adapters.
        path: The file, or the folder that contains ``adapter.safetensors``; or an adapter in another format.
        adapter: The name that the adapter gets: any text without "." or "/", up to 64 characters.
        trainable: Whether to train the adapter further. By default it is loaded for inference.
        check_config: Whether to refuse a base with the same weights whose config says that it computes something else,
            such as another `rms_norm_eps`, RoPE or number of heads.

    Returns:
        The same object, with the adapter active in addition to those that are.

    Raises:
        FileError: The file is missing or damaged, tunerkit did not write it, its tensors do not fit its header, or they
            contain NaN or inf.
        BaseMismatchError: The adapter was trained on a different base model, or its config differs.
        TargetError: The weight of a target is tied to one without an adapter, or on the meta device; or ``trainable``
            is set and a quantised layer passes no gradient on.
        AdapterError: The name is taken or invalid, or the model cannot take an adapter now: it is merged, disabled,
            inside DDP, FSDP or an engine of DeepSpeed, a PeftModel, or running in another thread.
        UnknownMethodError: No installed plugin provides the method.
        ConfigError: The method rejects the config in the file.
    """
    # Torch trains no parameter that is made in inference mode.
    with libraries.outside_zero_init(), torch.inference_mode(False):
        return load_onto(base, path, adapter=adapter, trainable=trainable, check_config=check_config)


def open_unloaded(skeleton: M, path: str | os.PathLike[str], *, adapter: str = "default") -> M:
    """Put a saved adapter into a model whose weights are on the meta device, to write it in another format.

    The adapter itself is on the CPU. The model cannot run. Of the base, only names, shapes and settings are compared.
    """
    return load_onto(skeleton, path, adapter=adapter, unloaded=True)


def load_onto(
    base: M,
    path: str | os.PathLike[str],
    *,
    adapter: str,
    trainable: bool = False,
    check_config: bool = True,
    unloaded: bool = False,
) -> M:
    """Do what `load` and `open_unloaded` say."""
    root = injection.ready_model(base, adapter, trainable=trainable)
    format = format_at(path)
    if format is not None:
        scanned = targets.scan(root, hooks.gather_knowledge(), unloaded=unloaded)
        if trainable:
            targets.refuse_impassable(scanned)
        adopted = adopt(format, path, scanned, adapter)
        warn_of(adopted.remarks, os.fspath(path))  # before: where warnings are errors, nothing is loaded
        steps.watch_optimizers(adopted.tuner.method)
        note_base(adopted.tuner, scanned)
        injection.inject_(adopted.tuner, adopted.slots, scanned, trainable=trainable)
        return base
    source, tensors, header = read(path, content="adapter")
    scanned = targets.scan(root, hooks.gather_knowledge(), unloaded=unloaded)
    if trainable:
        targets.refuse_impassable(scanned)
    tuner = _tuner_from(header, scanned, adapter, source)
    note_base(tuner, scanned)
    refuse_other_base(tuner, header, source, scanned, check_config=check_config)
    refuse_nonfinite(tensors, base_values(tuner), source)
    # The file overwrites the initial values; keep the caller's random state.
    with patterns.one_allowance(), torch.random.fork_rng(devices=[]):
        built = injection.build_each(scanned, tuner, around=limit_for(header.config, tensors, source))
        slots = fill(built, tensors, root, source)
    steps.watch_optimizers(tuner.method)
    injection.inject_(tuner, slots, scanned, trainable=trainable)
    warn_of_lone(tuner)
    return base


def header_of(
    tuner: Tuner,
    *,
    content: str,
    base: dict[str, dict[str, Any]] | None = None,
    values: dict[str, Any] | None = None,
    history: list[Any] | None = None,
) -> Header:
    """Return the header for a file of ``tuner``; ``content`` is its kind, and only some kinds have the other fields."""
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
        base=base or {},
        values=values or {},
        history=history or [],
    )


def _tuner_from(header: Header, scanned: Scan, adapter: str, source: str) -> Tuner:
    beside, model = beside_of(header, source), scanned.root.module
    try:
        found = targets.from_paths(scanned, [*header.targets, *header.copies, *header.biases, *beside])
    except TargetError as error:
        raise BaseMismatchError(f"{source} was trained on another base model: {error}") from error
    by_path = {place.path: place for place in found}
    chosen, copies, biases = (tuple(by_path[path] for path in paths) for paths in header.places.values())
    outputs = hooks.registry.get(header.method).targets == "outputs"
    try:
        targets.refuse_unfit(scanned, chosen, outputs=outputs)
        targets.refuse_tied(scanned, header.copies)
    except TargetError as error:
        raise TargetError(f"{source} cannot be loaded onto this model: {error}") from error
    return Tuner(
        name=adapter,
        method=header.method,
        config=hooks.structure(header.method, header.config),
        model=model,
        targets=chosen,
        copies=copies,
        biases=biases,
        loaded=True,
        progress=Progress(
            total_steps=header.total_steps,
            calibration=_calibration(header),
            shapes=injection.shapes_of(model),
            beside=beside,
            files={os.path.realpath(source): "adapter"},
        ),
    )


def _calibration(header: Header) -> dict[str, int] | None:
    """The entry as it was saved; anything else that a file may have there is ignored, since nothing depends on it."""
    match header.values.get(_CALIBRATION):
        case {"batches": int(batches), "rows": int(rows)}:
            return {"batches": batches, "rows": rows}
    return None
