"""Save an adapter to one safetensors file, and load it: loading repeats the steps of `wrap` with the file's choices."""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tunerkit import hooks, injection, layers, patterns, steps, targets
from tunerkit.config import unstructure
from tunerkit.errors import AdapterError, BaseMismatchError, TargetError, warn
from tunerkit.injection import Progress, Tuner, slots_in
from tunerkit.paths import few, join
from tunerkit.records import Format
from tunerkit.serialization.adopting import adopt
from tunerkit.serialization.fingerprint import (
    base_values,
    beside_of,
    described,
    fingerprint,
    note_base,
    refuse_other_base,
    refuse_places,
    warn_of_lone,
)
from tunerkit.serialization.formats import format_at
from tunerkit.serialization.header import Header, read, write
from tunerkit.serialization.safetensors_file import file_at
from tunerkit.serialization.tensor_checks import fill, limit_for, refuse_nonfinite
from tunerkit.targets import Scan

_RANKS = "ranks"  # the entry with the live ranks, from which `tunerkit show` tells them without the plugin
_CALIBRATION = "calibration"  # the entry of the header's ``values`` with the data that set the adapter's start
_REBUILD = (
    "wrap first, then build the optimizer from the parameters with requires_grad. tunerkit.attach(model, optimizer) "
    "finds this before training"
)
_DIVERGED = (
    "Nothing was written, and an older file is unchanged. The training has diverged: lower the learning rate, check "
    "the loss, and start again from a file saved earlier. To write the weights all the same and examine them, call "
    "tunerkit.save(..., allow_nonfinite=True)"
)
M = TypeVar("M", bound=nn.Module)


def save(
    model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None, allow_nonfinite: bool = False
) -> Path:
    """Write one adapter to a file.

    An older file of the adapter is replaced atomically, and the new one keeps its mode. A warning says if the adapter
    was never trained, or if the base was trained too or resized, which the file does not hold.

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
    tuner, place = injection.tuner(model, adapter), file_at(path, "adapter")
    steps.report_undriven(tuner, saving=True)
    written = write_trained(tuner, place, functools.partial(_write, tuner, place, allow_nonfinite))
    injection.warn_of_base_changes([tuner])
    return written


def write_trained(tuner: Tuner, place: Path, write: Callable[[], Path]) -> Path:
    """Call ``write`` in one process, after the checks of an adapter at the end of its training; return its path."""
    if injection.needs_steps(tuner) and _is_fresh(tuner):
        raise AdapterError(
            f"adapter {tuner.name!r} was trained with no step: method {tuner.method!r} needs to see each step of the "
            "optimizer. Call tunerkit.attach(model, optimizer, total_steps=...) before training"
        )
    _refuse_unsavable(tuner)
    warn_of_unspent_schedule(tuner)
    with tuner.whole():
        written = written_once(tuner, place, write)
        _warn_of_untrained(tuner)
    return written


def save_tuner(tuner: Tuner, path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> Path:
    """Write one adapter as it is now, at any point of its schedule. Checkpoints use this."""
    _refuse_unsavable(tuner)
    place = file_at(path, "adapter")
    with tuner.whole():
        return written_once(tuner, place, functools.partial(_write, tuner, place, allow_nonfinite))


def written_once(tuner: Tuner, place: Path, write: Callable[[], Path]) -> Path:
    """Call ``write`` in one of the processes that train an adapter together; return the path in all of them."""
    engine, content = injection.engine_of(tuner), ""
    if engine.is_shared:
        # The same in all processes, and another after each step or allocation. Weights may differ in their last bits.
        state = [tuner.name, tuner.steps, len(tuner.history), tuner.ranks()]
        content = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return engine.write_once(place, content, write)


def _write(tuner: Tuner, place: Path, allow_nonfinite: bool) -> Path:
    tensors = tensors_of(tuner, allow_nonfinite=allow_nonfinite)
    values = {**described(tuner), _RANKS: tuner.ranks()}
    if tuner.progress.calibration is not None:
        values[_CALIBRATION] = tuner.progress.calibration
    base = tuner.progress.fingerprint or fingerprint(tuner)  # the one from before a permanent merge
    return write_own(tuner, place, header_of(tuner, content="adapter", base=base, values=values), tensors)


def header_of(tuner: Tuner, *, content: str, **fields: Any) -> Header:
    """Return the header for a file of ``tuner``; ``content`` is its kind, and only some kinds have the other fields."""
    owner = hooks.registry.owner_of(tuner.method)
    paths = tuple(target.path for target in tuner.targets)
    rest: dict[str, Any] = {"base": {}, "values": {}, "history": (), **fields}
    return Header(
        kind=content,
        method=tuner.method,
        config=patterns.at_paths(unstructure(tuner.config.settled()), paths),
        targets=paths,
        copies=tuple(place.path for place in tuner.copies),
        biases=tuple(place.path for place in tuner.biases),
        steps=tuner.steps,
        total_steps=tuner.total_steps,
        versions={"tunerkit": version("tunerkit"), "torch": torch.__version__, owner.distribution: owner.version},
        **rest,
    )


def write_own(tuner: Tuner, place: Path, header: Header, tensors: Mapping[str, Tensor]) -> Path:
    """Write an adapter or its training state. Warn if the file was the only such one of another adapter here."""
    write(place, header, tensors)
    file, content, own = os.path.realpath(place), header.kind, tuner.progress.files
    for other in injection.tuners_of(tuner.model).values():
        held = other.progress.files
        if file not in own and [name for name, kind in held.items() if kind == content] == [file]:
            what = "" if content == "adapter" else "the training state of "
            warn(
                f"{file} held {what}adapter {other.name!r} of this model, and holds {what}{tuner.name!r} now. If you "
                f"want both, save {other.name!r} again, into a folder or under a file name of its own"
            )
        if other is not tuner:
            held.pop(file, None)
    own[file] = content
    return place


# --- Before an adapter is written -------------------------------------------------------------------------------------


def tensors_of(tuner: Tuner, *, allow_nonfinite: bool = False) -> dict[str, Tensor]:
    """All tensors of an adapter, by ``<path of the module>.<name in the slot>``, where they have finite values."""
    tensors = {join(path, name): tensor for path, slot in slots_in(tuner) for name, tensor in slot.state_dict().items()}
    away = [name for name, tensor in tensors.items() if tensor.is_meta]
    if away:
        holders = (layers.weights.offloading(module) for _, slot in slots_in(tuner) for module in slot.modules())
        holder = next(filter(None, holders), None)
        way_out = "load it" if holder is None else f"if {holder.name} offloads it, {holder.way_out}"
        raise AdapterError(
            f"adapter {tuner.name!r} is on the meta device ({away[0]}, ...), so there is nothing to save: {way_out} "
            "first"
        )
    if not allow_nonfinite:
        refuse_nonfinite(tensors, base_values(tuner), f"adapter {tuner.name!r}", _DIVERGED, AdapterError)
    return tensors


def _refuse_unsavable(tuner: Tuner) -> None:
    """Raise `AdapterError` if no base would fit the file, or nothing here can gather the adapter's shards."""
    injection.refuse_restricted(injection.base_modules(tuner.model), "save")
    injection.refuse_lost([tuner])
    holder = None if injection.engine_of(tuner).splits else layers.weights.sharding(tuner.parameters())
    if holder is not None:
        shards = [name for name, parameter in tuner.named_parameters() if layers.is_sharded(parameter)]
        error = AdapterError(
            f"each process holds a shard of adapter {tuner.name!r} ({few(shards, shown=2)}), and only an attached one "
            "is gathered: call tunerkit.attach after sharding, in every process, and save in every process"
        )
        raise hooks.because_of(holder, hooks.specs.tunerkit_holdings, error)


def warn_of_unspent_schedule(tuner: Tuner) -> None:
    """Warn if the ranks are above their final budget: expected in a checkpoint, but not after training."""
    if tuner.steps == 0 or tuner.total_steps is None:
        return
    final = hooks.budget(tuner, tuner.total_steps)
    if final is not None and (now := tuner.budget()) > final:
        warn(
            f"adapter {tuner.name!r} is at step {tuner.steps} of {tuner.total_steps} with a budget of {now}, above the "
            f"final {final}; if training is over, call tuner.finish() before you save"
        )


def _warn_of_untrained(tuner: Tuner) -> None:
    """Warn of untrained parameters. A method that needs steps cannot miss them, and `attach` checks its own."""
    if tuner.progress.loaded or injection.needs_steps(tuner) or (tuner.steps == 0 and not _is_fresh(tuner)):
        return
    saved, has_idle_matrices = f"adapter {tuner.name!r} was saved", injection.is_untrained(tuner)
    if has_idle_matrices and tuner.steps == 0 and injection.adds_nothing(tuner):
        warn(
            f"{saved} untrained: it adds nothing to the model. Most often the optimizer was built before "
            f"tunerkit.wrap, or from other parameters: {_REBUILD}"
        )
    elif has_idle_matrices:
        after = f" after {tuner.steps} steps" if tuner.steps else ""
        warn(
            f"{saved}{after}, and none of its matrices is trained: they add nothing to the model. Check that the "
            "optimizer holds them, that they were not frozen by hand (requires_grad), that gradients are cleared after "
            "the step and not before it, and that the learning rate is not 0"
        )
    elif tuner.steps == 0 and (kept := injection.untrained_copies(tuner)):
        warn(
            f"{saved}, and what it trains in full is as it was: {few(kept, shown=3)}. A new head is random then. Most "
            f"often the optimizer was built without it: {_REBUILD}"
        )


def _is_fresh(tuner: Tuner) -> bool:
    """Whether the adapter is as its method built it: no file, no step and no data changed it."""
    return not tuner.progress.loaded and tuner.steps == 0 and tuner.progress.calibration is None


# --- Loading ----------------------------------------------------------------------------------------------------------


def load(
    base: M,
    path: str | os.PathLike[str],
    *,
    adapter: str = "default",
    trainable: bool = False,
    check_config: bool = True,
) -> M:
    """Put a saved adapter into a model, in place.

    If this raises, the model is unchanged, and the error lists every problem. A KeyboardInterrupt leaves it unchanged
    too, unless it comes after the adapter is complete.

    Adapters of other programs are loaded if a plugin knows their format: tunerkit-peft reads PEFT's folders, and
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
            is set and a quantized layer passes no gradient on.
        AdapterError: The name is taken or invalid, or the model cannot take an adapter now: it is merged, disabled,
            inside DDP, FSDP or an engine of DeepSpeed, a PeftModel, or running in another thread.
        UnknownMethodError: No installed plugin provides the method.
        ConfigError: The method rejects the config in the file.
    """
    # Torch trains no parameter that is made in inference mode.
    with layers.weights.new_modules_whole(), torch.inference_mode(False):
        return _load(base, path, adapter, trainable=trainable, check_config=check_config)


def open_unloaded(
    skeleton: M, path: str | os.PathLike[str], *, adapter: str = "default", format: Format | None = None
) -> M:
    """Put a saved adapter into a model whose weights are on the meta device, to write it in another format.

    The adapter itself is on the CPU. Only names, shapes and settings of the base are compared. ``format`` reads it in
    place of the format that the path holds.
    """
    return _load(skeleton, path, adapter, unloaded=True, format=format)


def _load(
    base: M,
    path: str | os.PathLike[str],
    adapter: str,
    *,
    trainable: bool = False,
    check_config: bool = True,
    unloaded: bool = False,
    format: Format | None = None,
) -> M:
    root = injection.ready_model(base, adapter, trainable=trainable)
    format = format or format_at(path)
    file = None if format is not None else read(path, content="adapter")
    scanned = targets.scan(root, hooks.gather_knowledge(), unloaded=unloaded)
    targets.warn_of_unknown_packed(scanned)
    if trainable:
        targets.refuse_impassable(scanned)
    if format is not None:
        source, header = os.fspath(path), None
        tuner, tensors, ready = adopt(format, path, scanned, adapter)
    else:
        assert file is not None
        (source, tensors, header), ready = file, None
        tuner = _tuner_from(header, scanned, adapter, source)
    note_base(tuner, scanned)
    if header is not None:
        refuse_other_base(tuner, header, source, scanned, check_config=check_config)
    refuse_nonfinite(tensors, base_values(tuner), source)
    # The file overwrites the initial values; keep the caller's random state.
    with torch.random.fork_rng(devices=[]):
        around = limit_for(unstructure(tuner.config), tuner.targets, tensors, source)
        slots = fill(injection.build_each(scanned, tuner, around=around, ready=ready), tensors, root, source)
    with injection.Undo() as undo:
        undo.callback(steps.unwatch_, root)
        injection.inject_(tuner, slots, scanned, undo, trainable=trainable)
        steps.watch_(tuner)
    warn_of_lone(tuner)
    return base


def _tuner_from(header: Header, scanned: Scan, adapter: str, source: str) -> Tuner:
    beside, model = beside_of(header, source), scanned.root.module
    try:
        targets.from_paths(scanned, [*header.targets, *header.copies, *header.biases, *beside])
    except TargetError as error:
        raise BaseMismatchError(f"{source} was trained on another base model: {error}") from error
    chosen, copies, biases = (targets.from_paths(scanned, paths) for paths in header.places.values())
    adapts = hooks.registry.get(header.method).targets
    refuse_places(scanned, chosen, header.copies, source, adapts=adapts)
    if (owner := hooks.registry.owner_of(header.method).distribution) not in header.versions:
        others = few([*(header.versions.keys() - {"tunerkit", "torch"})], shown=2)
        if others and hooks.IN_PROCESS not in (owner, others):  # what a notebook tries may be installed later
            known = f"{source} was saved with method {header.method!r} of {others}; here it is {owner}'s"
            warn(f"{known}, which may compute something else: install the former, and list it in TUNERKIT_PLUGINS")
    calibration = None
    match header.values.get(_CALIBRATION):
        case {"batches": int(batches), "rows": int(rows)}:  # nothing depends on it, so anything else is ignored
            calibration = {"batches": batches, "rows": rows}
    return Tuner(
        name=adapter,
        method=header.method,
        config=hooks.structure(header.method, header.config),
        model=model,
        targets=chosen,
        copies=copies,
        biases=biases,
        progress=Progress(
            loaded=True,
            total_steps=header.total_steps,
            calibration=calibration,
            beside=beside,
            files={os.path.realpath(source): "adapter"},
        ),
    )
