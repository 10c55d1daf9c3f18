"""Rejects models, names and settings with which no adapter can be put in, and changes of a model that is running."""

import functools
import re
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from tunerkit import hooks
from tunerkit.errors import AdapterError, ConfigError, TunerkitWarning, closest
from tunerkit.injection.models import base_modules, inside, refuse_fixed, slots_of, walk
from tunerkit.injection.slots import Slot
from tunerkit.injection.tuner import Tuner, tuners_of
from tunerkit.layers import is_named, torch_private, weights
from tunerkit.paths import CHILD, is_under, join
from tunerkit.patterns import matcher
from tunerkit.records import Restriction
from tunerkit.targets import Scan

_NAME = r"[^./\ud800-\udfff]{1,64}"


def check_name(adapter: object, taken: Collection[str]) -> None:
    """Raise `AdapterError` for a name that cannot be a part of parameter names, or that another adapter has."""
    if not isinstance(adapter, str) or not re.fullmatch(_NAME, adapter):
        raise AdapterError(
            f"adapter name {adapter!r}: expected 1 to 64 characters without '.', '/' or half of a surrogate pair, "
            "which no file can store in the names of parameters; choose another"
        )
    if adapter in taken:
        raise AdapterError(f"the model has an adapter named {adapter!r} already; choose another, or delete that one")


def ready_model(model: object, adapter: str, *, trainable: bool) -> nn.Module:
    """Return the model inside `torch.compile` and the like. Raise `AdapterError` if it cannot take another adapter."""
    root = inside(model)
    lazy = [name for name, p in root.named_parameters() if issubclass(type(p), UninitializedParameter)]
    if lazy:
        raise AdapterError(f"the model has parameters without a shape yet ({lazy[0]}, ...); run one batch first")
    if trainable and (name := next((name for name, p in root.named_parameters() if p.is_inference()), None)):
        raise AdapterError(
            f"the model was built inside torch.inference_mode(), and torch trains nothing beside such weights ({name}, "
            "...); build or load it outside"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in root.modules()):
        raise AdapterError("the model is already inside DistributedDataParallel; wrap it first, then put it into DDP")
    refuse_restricted(base_modules(root), "wrap")
    tuners = tuners_of(root)
    wrapped = next((tuner.model for tuner in tuners.values()), None)
    if wrapped is not root and (tuners or next(walk(root), None) is not None):
        whole = f"the {type(wrapped).__name__} inside it" if wrapped is not None else "the model that it is a part of"
        raise AdapterError(f"{whole} has adapters already; wrap that one, so that one model holds them all")
    foreign = [path for path, module in base_modules(root) if hasattr(module, CHILD) and slots_of(module) is None]
    if foreign:
        raise AdapterError(
            f"the model has an attribute {CHILD!r} of its own at {foreign[0]!r}; adapters go there: rename it"
        )
    check_name(adapter, tuners)
    refuse_fixed(root, "adding an adapter")
    return root


def refuse_restricted(modules: Iterable[tuple[str, nn.Module]], verb: str) -> None:
    """Raise the error of the first restriction of ``verb`` that applies to something in ``modules``.

    Args:
        modules: Pairs of a path and a module. The modules inside it are not searched.
        verb: A key of `Restriction.refused`.
    """
    # Nearly always nothing is found, so the search is for all at once.
    restrictions = [each for each in hooks.gather_restrictions() if verb in each.refused]
    marks = {name for each in restrictions for name in each.marks}
    known: dict[type, bool] = {}
    for path, module in modules:
        own: list[tuple[str, nn.Module | nn.Parameter]] = [("", module)]
        own += [(name, p) for name, p in torch_private.own_parameters(module).items() if p is not None]
        for name, thing in own:
            if type(thing) not in known:
                known[type(thing)] = any(_is_of(type(thing), each) for each in restrictions)
            if known[type(thing)] or not marks.isdisjoint(vars(thing)):
                _refuse_thing(thing, join(path, name) if name else path, restrictions, verb)


def _refuse_thing(thing: nn.Module | nn.Parameter, path: str, restrictions: Iterable[Restriction], verb: str) -> None:
    held = vars(thing)
    for each in restrictions:
        marked = any(name in held and value in (None, held[name]) for name, value in each.marks.items())
        if marked or _is_of(type(thing), each):
            place = f"at {path!r}" if path else "in the model itself"
            error = each.error or AdapterError
            raise error(f"cannot {verb} with {each.name}, found {place}: {each.refused[verb]}")


def _is_of(kind: type, restriction: Restriction) -> bool:
    return any(is_named(kind, name) for name in restriction.classes)


def refuse_idle_patterns(tuner: Tuner) -> None:
    """Raise `ConfigError` for a per-target setting that matches no target: most often the name is mistyped."""
    paths = [target.path for target in tuner.targets]
    names = {path.rpartition(".")[2] for path in paths}
    problems = [
        f"{pattern!r} matches none of the {len(paths)} targets{closest(pattern, names)} @ $.{field}"
        for pattern, field in tuner.config.target_patterns()
        if not any(map(matcher(pattern), paths))
    ]
    if problems:
        raise ConfigError(problems)


def refuse_overlap(model: nn.Module, paths: Collection[str], copies: Collection[str]) -> None:
    """Reject a module trained in full that is, contains or is inside a module of another adapter.

    Several adapters may each train a copy of one module, if none of the others is active.
    """
    starts = [(path, f"{path}.") for path in paths]
    for path, _, slots in walk(model):
        owners, start = ", ".join(repr(name) for name in slots.names), f"{path}."
        if path in copies and len(slots.copies) == len(slots.names):
            if slots.active:
                raise AdapterError(
                    f"cannot train {path!r} in full: adapter {slots.active[0]!r} does and is active, and one replaces "
                    "the other; call tunerkit.activate(model, []) first, then activate the one that is wanted"
                )
            continue
        nested = [each for each, below in starts if start.startswith(below) or below.startswith(start)]
        if copied := [wanted for wanted in nested if wanted in copies]:
            raise AdapterError(f"cannot train {copied[0]!r} in full: adapter {owners} is at {path!r}; delete it first")
        if nested and slots.copies:
            raise AdapterError(f"cannot adapt {nested[0]!r}: adapter {owners} trains {path!r} in full")


def refuse_mixed_dtypes(tuner: Tuner, built: Mapping[str, Slot]) -> None:
    """Raise `AdapterError` if the engine that has divided the base wants one dtype for all that is trained beside it.

    Args:
        tuner: The adapter's handle.
        built: Its slots by path.
    """
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for slot in built.values() for p in slot.parameters()})
    holder = weights.emptied(tuner.model.parameters()) if len(dtypes) > 1 else None
    if holder is not None and holder.one_dtype:
        raise AdapterError(
            f"what would be trained has the dtypes {' and '.join(dtypes)}, and {holder.one_dtype}. Copies and biases "
            "have the base's: set adapter_dtype to it, or train none in full"
        )


def warn_of_limits(scanned: Scan, tuner: Tuner) -> None:
    """Warn about norms of the frozen base that training still changes, and about targets without dropout."""
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
        warnings.warn(
            f"{len(moving)} normalisation layers of the frozen base ({moving[0]}, ...) update their running statistics "
            "in training mode, and the adapter's file does not contain them. Put these layers in eval mode while "
            "training, or name them in train_modules",
            TunerkitWarning,
            stacklevel=3,
        )
    bypassed = [target.path for target in tuner.targets if scanned.by_path[target.path].reader is not None]
    if bypassed and tuner.config.dropout:
        warnings.warn(
            f"dropout is not applied at {len(bypassed)} targets ({bypassed[0]}, ...): their owner uses the weight "
            "directly, bypassing the layer's forward(), so the adapter changes the weight and gets no input. Set "
            "dropout to 0, or exclude them if that matters",
            TunerkitWarning,
            stacklevel=3,
        )


class _Threads(WeakSet[threading.Thread]):
    """The threads that are inside the model's forward. A copy or a pickle of the model starts with none.

    By object, not by number: the system gives the number of a thread that has ended to the next one.
    """

    def __reduce__(self) -> tuple[type["_Threads"], tuple[()]]:
        return type(self), ()


_ATTRIBUTE = "_tunerkit_threads"


def watch_threads_(model: nn.Module) -> None:
    """Note which threads run ``model``, from now on."""
    threads = vars(model)[_ATTRIBUTE] = _Threads()
    model.register_forward_pre_hook(functools.partial(enter, threads), prepend=True)
    # Also called after an exception, or that thread would count as running.
    model.register_forward_hook(functools.partial(leave, threads), always_call=True)


def unwatch_threads_(model: nn.Module) -> None:
    """Undo `watch_threads_`."""
    torch_private.remove_hooks_(model, enter, leave)
    vars(model).pop(_ATTRIBUTE, None)


# Not under compile: compiled code must not have a Python side effect in each call.
def enter(threads: WeakSet[threading.Thread], model: nn.Module, args: Any) -> None:
    """Note that this thread runs ``model``: with ``threads`` bound, its forward pre-hook."""
    if not torch.compiler.is_compiling():
        threads.add(threading.current_thread())


def leave(threads: WeakSet[threading.Thread], model: nn.Module, args: Any, output: Any) -> None:
    """Undo `enter`: the forward hook."""
    if not torch.compiler.is_compiling():
        threads.discard(threading.current_thread())


def refuse_running(model: nn.Module, what: str) -> None:
    """Raise `AdapterError` if another thread is inside the forward of ``model``.

    Its output would be computed in part before and in part after the change. What is not seen: a forward that starts
    after this check, one of a part of the model alone, and compiled code. Those need a lock of the caller's.

    A thread that lives on after an interrupt (KeyboardInterrupt, SystemExit) in its forward counts until its next one.
    Torch calls hooks after an `Exception` only, and code outside of the call sees its end only by walking frames. A
    ``finally`` around the call needs another class for the model or a ``forward`` on the instance. The first would
    change its type; the second would hide the ones that accelerate and TRL set there, and be hidden by them.
    """
    threads: WeakSet[threading.Thread] = vars(model).get(_ATTRIBUTE, _Threads())
    running = [thread for thread in threading.enumerate() if thread in threads]
    if running and running != [threading.current_thread()]:
        raise AdapterError(
            f"another thread runs this {type(model).__name__}, and its output would be wrong if {what} changed the "
            "model now; wait until it is done, and let your server hold one lock for both. If it was interrupted in "
            "the model's forward (KeyboardInterrupt), run the model there once more"
        )
