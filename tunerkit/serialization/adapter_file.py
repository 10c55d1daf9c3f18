"""Save an adapter to one safetensors file, and load it by repeating the steps of `wrap` with the file's settings."""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tunerkit import hooks, injection, layers, patterns, steps, targets
from tunerkit.config import large_in, unstructure
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

# Entries of the header's ``values``: live ranks, so that `tunerkit show` needs no plugin; amount of calibration data.
_RANKS, _CALIBRATION = "ranks", "calibration"
_REBUILD = (
    "wrap first, then build the optimizer from the parameters with requires_grad. tunerkit.attach(model, optimizer) "
    "detects this mistake before training"
)
_DIVERGED = (
    "Nothing was written, and an older file is unchanged. The training has diverged: lower the learning rate, check "
    "the loss, and restart from an earlier file. To write these weights anyway and inspect them, call "
    "tunerkit.save(..., allow_nonfinite=True)"
)
M = TypeVar("M", bound=nn.Module)


def save(
    model: nn.Module, path: str | os.PathLike[str], *, adapter: str | None = None, allow_nonfinite: bool = False
) -> Path:
    """Write one adapter to a file.

    An older file of the adapter is replaced atomically, and the new one keeps its mode. A warning is given if the
    adapter was never trained, or if the base was trained or resized: the file does not contain the base.

    Args:
        model: The wrapped model.
        path: A folder, which gets ``adapter.safetensors`` and is created if it is missing; or a file, if the path ends
            in ``.safetensors``.
        adapter: The adapter's name. It may be left out if the model has only one.
        allow_nonfinite: Whether to write weights that contain NaN or inf, to examine them. `load` refuses such a file.

    Returns:
        The file's path.

    Raises:
        AdapterError: The method needs steps and the adapter was trained for none; its weights contain NaN or inf, are
            offloaded, or are sharded by FSDP or ZeRO-3 and not attached; or adapted modules were replaced or resized
            after wrapping, so that no base model would fit the file. An older file is unchanged.
        FileError: The file cannot be written, or the path is a safetensors file of another program. An older file is
            unchanged.
    """
    tuner, place = injection.tuner(model, adapter), file_at(path, "adapter")
    steps.report_undriven(tuner, saving=True)
    written = write_trained(tuner, place, functools.partial(_write, tuner, place, allow_nonfinite))
    injection.warn_of_base_changes([tuner])
    return written


def write_trained(tuner: Tuner, place: Path, write: Callable[[], Path]) -> Path:
    """Check that an adapter is trained and can be saved, call ``write`` in one process, and return the path."""
    if injection.needs_steps(tuner) and _is_fresh(tuner):
        raise AdapterError(
            f"adapter {tuner.name!r} was trained for 0 steps: method {tuner.method!r} must run at every optimizer "
            "step. Call tunerkit.attach(model, optimizer, total_steps=...) before training"
        )
    _refuse_unsavable(tuner)
    warn_of_unspent_schedule(tuner)
    with tuner.whole():
        written = written_once(tuner, place, write)
        _warn_of_untrained(tuner)
    return written


def save_tuner(tuner: Tuner, path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> Path:
    """Write an adapter to a checkpoint, even before the end of training, and return the file's path."""
    _refuse_unsavable(tuner)
    place = file_at(path, "adapter")
    with tuner.whole():
        return written_once(tuner, place, functools.partial(_write, tuner, place, allow_nonfinite))


def written_once(tuner: Tuner, place: Path, write: Callable[[], Path]) -> Path:
    """Call ``write`` in one of the processes that train the adapter; return the path in every process."""
    engine, content = injection.engine_of(tuner), ""
    if engine.is_shared:
        # Equal in all processes, and changed by each step or allocation; weights may differ in their last bits.
        state = [tuner.name, tuner.steps, len(tuner.history), tuner.ranks()]
        content = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return engine.write_once(place, content, write)


def _write(tuner: Tuner, place: Path, allow_nonfinite: bool) -> Path:
    tensors = tensors_of(tuner, allow_nonfinite=allow_nonfinite)
    values = {**described(tuner), _RANKS: tuner.ranks()}
    if tuner.progress.calibration is not None:
        values[_CALIBRATION] = tuner.progress.calibration
    base = tuner.progress.fingerprint or fingerprint(tuner)  # the former is from before a permanent merge
    return write_own(tuner, place, header_of(tuner, content="adapter", base=base, values=values), tensors)


def header_of(tuner: Tuner, *, content: str, **fields: Any) -> Header:
    """Return a file's header; ``content`` is "adapter" or "state", and ``fields`` set base, values or history."""
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
    """Write an adapter or its training state; warn if this overwrites another adapter's only file of that kind."""
    write(place, header, tensors)
    file, content, own = os.path.realpath(place), header.kind, tuner.progress.files
    for other in injection.tuners_of(tuner.model).values():
        held = other.progress.files
        if file not in own and [name for name, kind in held.items() if kind == content] == [file]:
            what = "" if content == "adapter" else "the training state of "
            warn(
                f"{what}adapter {tuner.name!r} has overwritten {what}adapter {other.name!r} in {file}. To keep both, "
                f"save {other.name!r} again to another folder or file"
            )
        if other is not tuner:
            held.pop(file, None)
    own[file] = content
    return place


# --- Before an adapter is written -------------------------------------------------------------------------------------


def tensors_of(tuner: Tuner, *, allow_nonfinite: bool = False) -> dict[str, Tensor]:
    """Return an adapter's tensors by ``<path>.<name>``. Raises `AdapterError` if some are offloaded or not finite."""
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
    """Raise `AdapterError` if adapted modules were replaced, or the adapter is sharded and cannot be gathered."""
    injection.refuse_restricted(injection.base_modules(tuner.model), "save")
    injection.refuse_lost([tuner])
    holder = None if injection.engine_of(tuner).splits else layers.weights.sharding(tuner.parameters())
    if holder is not None:
        shards = [name for name, parameter in tuner.named_parameters() if layers.is_sharded(parameter)]
        error = AdapterError(
            f"adapter {tuner.name!r} is sharded ({few(shards, shown=2)}), and its shards can be gathered only if it is "
            "attached: call tunerkit.attach after sharding, in every process, and save in every process"
        )
        raise hooks.because_of(holder, hooks.specs.tunerkit_holdings, error)


def warn_of_unspent_schedule(tuner: Tuner) -> None:
    """Warn if the budget is above its final value, which is normal in a checkpoint but not after training."""
    if tuner.steps == 0 or tuner.total_steps is None:
        return
    final = hooks.budget(tuner, tuner.total_steps)
    if final is not None and (now := tuner.budget()) > final:
        warn(
            f"adapter {tuner.name!r} is at step {tuner.steps} of {tuner.total_steps} with a budget of {now}, above the "
            f"final {final}; if training is over, call tuner.finish() before you save"
        )


def _warn_of_untrained(tuner: Tuner) -> None:
    """Warn of untrained parameters; not if the method needs steps, since saving it untrained is an error already."""
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
            f"{saved}{after}, but its matrices are untrained and add nothing to the model. Check that the optimizer "
            "has these parameters, that requires_grad is True, that gradients are cleared after the step and not "
            "before it, and that the learning rate is not 0"
        )
    elif tuner.steps == 0 and (kept := injection.untrained_copies(tuner)):
        warn(
            f"{saved}, but modules trained in full have not changed: {few(kept, shown=3)}. If a head is new, it is "
            f"still random. Most often the optimizer was built without these modules: {_REBUILD}"
        )


def _is_fresh(tuner: Tuner) -> bool:
    """Whether the adapter is unchanged since its method built it: not loaded, not trained, not calibrated."""
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
    tunerkit-diffusers the files of diffusers and Kohya. One warning lists whatever the conversion loses.

    Args:
        base: The base model. It may already have other adapters.
        path: The file, or the folder that contains ``adapter.safetensors``; or an adapter in another format.
        adapter: The adapter's name in this model: any text without "." or "/", up to 64 characters.
        trainable: Whether to train the adapter further. By default it is loaded for inference.
        check_config: Whether to reject a base that has the same weights but other settings that change its output,
            such as `rms_norm_eps`, RoPE or the number of heads.

    Returns:
        The same object. The new adapter is active, and so are those that were active before.

    Raises:
        FileError: The file is missing or damaged, tunerkit did not write it, its tensors do not fit its header, or they
            contain NaN or inf.
        BaseMismatchError: The adapter was trained on a different base model, or its config differs.
        TargetError: A target's weight is tied to a module without an adapter, or is on the meta device; or
            ``trainable`` is set and a quantized layer does not propagate gradients.
        AdapterError: The name is taken or invalid, or the model cannot take an adapter now: it is merged, disabled,
            inside DDP, FSDP or an engine of DeepSpeed, a PeftModel, or running in another thread.
        UnknownMethodError: No installed plugin provides the method.
        ConfigError: The method rejects the config in the file.
    """
    # A parameter created in inference mode cannot be trained.
    ready = injection.prepared(base, adapter, trainable=trainable)
    with layers.weights.new_modules_whole(), torch.inference_mode(False), ready as root:
        _load(root, path, adapter, trainable=trainable, check_config=check_config)
    return base


def open_unloaded(skeleton: M, path: str | os.PathLike[str], *, format: Format | None = None) -> M:
    """Load an adapter into a model whose weights are on the meta device, to write it in another format.

    The adapter itself is on the CPU. Only names, shapes and settings of the base are compared. ``format`` overrides
    the format detected at ``path``.
    """
    with injection.prepared(skeleton, "default", trainable=False) as root:
        _load(root, path, "default", unloaded=True, format=format)
    return skeleton


def _load(
    root: nn.Module,
    path: str | os.PathLike[str],
    adapter: str,
    *,
    trainable: bool = False,
    check_config: bool = True,
    unloaded: bool = False,
    format: Format | None = None,
) -> None:
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
    if layers.weights.may_be_sharded_later():
        note_base(tuner, scanned)
    if header is not None:
        refuse_other_base(tuner, header, source, scanned, check_config=check_config)
    refuse_nonfinite(tensors, base_values(tuner), source)
    # The file overwrites the initial values; keep the caller's random state.
    with torch.random.fork_rng(devices=[]):
        large = large_in(unstructure(tuner.config), [size for tensor in tensors.values() for size in tensor.shape])
        around = limit_for(large, tuner.targets, tensors, source) if large else nullcontext
        slots = fill(injection.build_each(scanned, tuner, around=around, ready=ready), tensors, root, source)
    with ExitStack() as undo:
        undo.callback(steps.unwatch_, root)
        injection.inject_(tuner, slots, scanned, undo, trainable=trainable)
        if hooks.watches_steps(tuner.method):
            steps.watch_(tuner)
        undo.pop_all()
    warn_of_lone(tuner)


def _tuner_from(header: Header, scanned: Scan, adapter: str, source: str) -> Tuner:
    beside, model = beside_of(header, source), scanned.root.module
    try:
        targets.from_paths(scanned, [*header.targets, *header.copies, *header.biases, *beside])
    except TargetError as error:
        raise BaseMismatchError(f"{source} was trained on another base model: {error}") from error
    chosen, copies, biases = (targets.from_paths(scanned, paths) for paths in header.places.values())
    refuse_places(scanned, chosen, header.copies, source, method=hooks.registry.get(header.method))
    if (owner := hooks.registry.owner_of(header.method).distribution) not in header.versions:
        others = few([*(header.versions.keys() - {"tunerkit", "torch"})], shown=2)
        if others and hooks.IN_PROCESS not in (owner, others):  # an in-process plugin may be a distribution later
            warn(
                f"{source} was saved with method {header.method!r} from {others}; the method here is from {owner} and "
                f"may compute something else: install {others}, and list only that in TUNERKIT_PLUGINS"
            )
    config = hooks.structure(header.method, header.config)
    settled = {name: value for name, value in unstructure(config.settled()).items() if value is not None}
    if unsaid := [f"{name} = {settled[name]!r}" for name in settled if header.config.get(name, 0) is None]:
        warn(
            f"{source} leaves settings to the defaults of the version that wrote it, and this one takes "
            f"{few(unsaid, shown=5)}: if that one took others, outputs are wrong; train again, or save it anew there"
        )
    calibration = None
    match header.values.get(_CALIBRATION):
        case {"batches": int(batches), "rows": int(rows)}:  # only shown to users, so other values are ignored
            calibration = {"batches": batches, "rows": rows}
    return Tuner(
        name=adapter,
        method=header.method,
        config=config,
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
