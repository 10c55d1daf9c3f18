"""Reject models, names and settings with which no adapter can be injected, and changes to a running model."""

import inspect
import re
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.parameter import UninitializedParameter

from tunerkit import hooks
from tunerkit.errors import AdapterError, ConfigError, closest, warn
from tunerkit.injection.slots import Slot, inside, places_in, refuse_fixed, walk
from tunerkit.injection.tuner import Tuner, tuners_of
from tunerkit.layers import torch_private, weights
from tunerkit.paths import CHILD, is_under, join
from tunerkit.patterns import matcher
from tunerkit.records import Restriction
from tunerkit.targets import Scan

_NAME = r"[^./\ud800-\udfff]{1,64}"


def check_name(adapter: object, taken: Collection[str]) -> None:
    """Raise `AdapterError` for a name that is invalid in parameter names, or taken by another adapter."""
    if not isinstance(adapter, str) or not re.fullmatch(_NAME, adapter):
        raise AdapterError(
            f"adapter name {adapter!r}: expected 1 to 64 characters without '.', '/' or half of a surrogate pair, "
            "which are not allowed in parameter names; choose another"
        )
    if adapter in taken:
        raise AdapterError(f"the model has an adapter named {adapter!r} already; choose another, or delete that one")


@contextmanager
def prepared(model: object, adapter: str, *, trainable: bool) -> Iterator[nn.Module]:
    """Yield the model inside wrappers, prepared by plugins; undo that on failure. Raises `AdapterError` if unready."""
    root = inside(model)
    for name, parameter in root.named_parameters():
        if issubclass(type(parameter), UninitializedParameter):
            raise AdapterError(f"the model has parameters without a shape yet ({name}, ...); run one batch first")
        if trainable and parameter.is_inference():
            raise AdapterError(
                "the model was built inside torch.inference_mode(), and torch cannot train adapters on such weights "
                f"({name}, ...); build or load it outside"
            )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in root.modules()):
        raise AdapterError("the model is already inside DistributedDataParallel; wrap it first, then put it into DDP")
    places = places_in(root)
    refuse_restricted([place[:2] for place in places], "wrap")
    tuners = tuners_of(root)
    wrapped = next((tuner.model for tuner in tuners.values()), None)
    if wrapped is not root and (tuners or any(slots for _, _, slots in places)):
        whole = f"the {type(wrapped).__name__} inside it" if wrapped is not None else "the model that it is a part of"
        raise AdapterError(f"{whole} has adapters already; wrap that model, so that one model has all adapters")
    for path, module, slots in places:
        if slots is None and hasattr(module, CHILD):
            raise AdapterError(f"the model has its own attribute {CHILD!r} at {path!r}, which adapters need; rename it")
    check_name(adapter, tuners)
    refuse_fixed(root, "adding an adapter")
    with ExitStack() as undo:
        adapted = [module for _, module, _ in walk(root)]
        undo.callback(hooks.tell, hooks.specs.tunerkit_adapted, model=root, modules=adapted)
        hooks.tell(hooks.specs.tunerkit_prepare, model=root)
        yield root
        undo.pop_all()


def refuse_restricted(modules: Iterable[tuple[str, nn.Module]], verb: str) -> None:
    """Raise an error if a restriction forbids ``verb`` for one of ``modules`` (path, module), children not included."""
    restrictions = [each for each in hooks.gather_restrictions() if verb in each.refused]
    marks = {name for each in restrictions for name in each.marks}
    of_class: dict[type, tuple[Restriction, ...]] = {}  # a model has many layers of few classes
    for path, module in modules:
        for name, thing in {"": module, **torch_private.own_parameters(module)}.items():
            if (kind := type(thing)) not in of_class:
                of_class[kind] = hooks.restrictions_of(kind)
            if thing is None or (not of_class[kind] and marks.isdisjoint(vars(thing))):
                continue
            for each in restrictions:
                own = vars(thing)
                marked = any(name in own and value in (None, own[name]) for name, value in each.marks.items())
                if each in of_class[kind] or marked:
                    place = join(path, name) if name else path
                    where = f"at {place!r}" if place else "in the model itself"
                    error = (each.error or AdapterError)(
                        f"cannot {verb} with {each.name}, found {where}: {each.refused[verb]}"
                    )
                    raise hooks.because_of(each, hooks.specs.tunerkit_restrictions, error)


def refuse_idle_patterns(tuner: Tuner) -> None:
    """Raise `ConfigError` for per-target patterns that match no target, since such patterns are mostly mistyped."""
    paths = [target.path for target in tuner.targets]
    names = {path.rpartition(".")[2] for path in paths}
    names |= {f"*.{part}.*" for path in paths for part in path.split(".")[:-1]}
    problems = [
        f"{pattern!r} matches none of the {len(paths)} targets{closest(pattern, names)} @ $.{field}"
        for pattern, field in tuner.config.target_patterns()
        if not any(map(matcher(pattern), paths))
    ]
    if problems:
        raise ConfigError(problems)


def refuse_overlap(model: nn.Module, paths: Collection[str], copies: Collection[str]) -> None:
    """Raise `AdapterError` if a module trained in full is, contains or is inside a module of another adapter.

    Exception: several adapters may each train a copy of the same module, if only one of them is active.
    """
    starts = [(path, f"{path}.") for path in paths]
    for path, _, slots in walk(model):
        owners, start = ", ".join(repr(name) for name in slots.names), f"{path}."
        if path in copies and len(slots.copies) == len(slots.names):
            if slots.active:
                raise AdapterError(
                    f"cannot train {path!r} in full: the active adapter {slots.active[0]!r} trains it too, and one "
                    "copy would replace the other; call tunerkit.activate(model, []) first, then activate one of them"
                )
            continue
        nested = [each for each, below in starts if start.startswith(below) or below.startswith(start)]
        if copied := [wanted for wanted in nested if wanted in copies]:
            raise AdapterError(f"cannot train {copied[0]!r} in full: adapter {owners} is at {path!r}; delete it first")
        if nested and slots.copies:
            raise AdapterError(f"cannot adapt {nested[0]!r}: adapter {owners} trains {path!r} in full")


def refuse_mixed_dtypes(tuner: Tuner, built: Mapping[str, Slot]) -> None:
    """Raise `AdapterError` if trained parameters have several dtypes and a library that shards the base needs one."""
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for slot in built.values() for p in slot.parameters()})
    holder = weights.emptied(tuner.model.parameters()) if len(dtypes) > 1 else None
    if holder is not None and holder.one_dtype:
        raise AdapterError(
            f"trained parameters would have the dtypes {' and '.join(dtypes)}, but {holder.one_dtype}. Copies and "
            "biases have the base's dtype: set adapter_dtype to it, or train no module or bias in full"
        )


def warn_of_limits(scanned: Scan, tuner: Tuner) -> None:
    """Warn if training changes running statistics of the frozen base, and if dropout cannot be applied at targets."""
    copies = {copied.path for copied in tuner.copies}
    moving = [
        found.path
        for found in (scanned.root, *scanned.modules)
        if torch_private.has_statistics(found.module)
        and found.module.track_running_stats
        and found.module.running_mean is not None
        and not is_under(found.path, copies)
    ]
    if moving:
        warn(
            f"{len(moving)} normalization layers of the frozen base ({moving[0]}, ...) update their running statistics "
            "in training mode, and the adapter's file does not contain these. Put the layers into eval mode while "
            "training, or name them in train_modules"
        )
    bypassed = [target.path for target in tuner.targets if scanned.by_path[target.path].reader is not None]
    if bypassed and tuner.config.dropout:
        warn(
            f"dropout is not applied at {len(bypassed)} targets ({bypassed[0]}, ...): their owner uses the weight "
            "directly, bypassing the layer's forward(), so the adapter changes the weight and gets no input. To treat "
            "all targets alike, set dropout to 0, or exclude these"
        )


def refuse_rows(model: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
    """Forward pre-hook of a wrapped model: reject `adapter_names`, which the forward would silently ignore."""
    rows = hooks.ROWS
    if kwargs.get(rows) is not None and rows not in inspect.signature(model.forward).parameters:
        raise AdapterError(f"{rows}= would be ignored: every row gets the active adapters{hooks.elsewhere(rows)}")


def refuse_running(model: nn.Module, what: str) -> None:
    """Raise `AdapterError` if another thread runs ``model``: its output would mix old and new state.

    The check misses calls that start later, calls of submodules, and calls inside compiled code: callers need a lock.
    """
    here = threading.get_ident()
    stacks = (torch_private.called_in(frame) for thread, frame in sys._current_frames().items() if thread != here)
    # The running module may be a compiled model or DataParallel.
    if any(inside(module) is model for called in stacks for module in called):
        raise AdapterError(
            f"another thread runs this {type(model).__name__}, and its output would be wrong if {what} changed the "
            "model now; wait until that call has ended, and guard calls and changes with one lock"
        )
