"""Checks that a wrapped model is still what was wrapped, and that its adapters run."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import AdapterError, warn
from tunerkit.injection.slots import base_modules, is_called, places_in, slots_of
from tunerkit.injection.tuner import Tuner, modules_in, slots_in, tuners_of, wrapped_of
from tunerkit.injection.weight_override import overridden_in
from tunerkit.layers import forward_name, is_packed, torch_private, whole_shape
from tunerkit.paths import few, is_under, join, parent

# The attribute of a model that is watched, until its report.
WATCHED = "_tunerkit_calls"
_LISTS = (nn.ModuleList, nn.ModuleDict)
_SHOWN = 3
_SAVE_BASE = "save the base too, inside tunerkit.disabled(model), and load the adapter onto that"


# --- Modules that were replaced or changed ----------------------------------------------------------------------------


def refuse_lost(tuners: Iterable[Tuner]) -> None:
    """Raise `AdapterError` naming the modules that were replaced, resized or stripped of their hook after wrapping."""
    lost = dict.fromkeys(found for tuner in tuners for found in _lost(tuner))  # several adapters may lose one module
    if lost:
        grouped = {reason: [path for path, other in lost if other == reason] for _, reason in lost}
        lines = "\n".join(f"- {', '.join(paths)}: {reason}" for reason, paths in grouped.items())
        raise AdapterError(
            f"adapters have no effect, or do not fit, where the model was changed after wrapping:\n{lines}\n"
            "Convert, replace or resize modules first, then call tunerkit.wrap or tunerkit.load"
        )


def _lost(tuner: Tuner) -> Iterator[tuple[str, str]]:
    slots_in(tuner)  # raises if the adapter itself was removed from a module
    modules = [module for _, module in base_modules(tuner.model)]
    # By identity, not by path: a module that was put into DDP or a compiled module still runs.
    present = set(map(id, modules))
    overridden = overridden_in(modules)
    for path, module in modules_in(tuner).items():
        slots, kind = slots_of(module), type(module).__name__
        assert slots is not None
        base, weights = slots.base, torch_private.own_parameters(module).values()
        if id(module) not in present:
            yield path, f"the {kind} that was adapted is not in the model any more"
        elif not is_called(module) and id(module) not in overridden:
            yield path, "its forward hook is gone"
        elif base is not None and any(map(is_packed, weights)) and not base.matches(module):
            yield path, f"the weight of the {kind} was quantised after it had been adapted"
        elif slots.is_resized(module):
            yield path, f"the {kind} has another size than when it was adapted"


# --- Modules that are never called ------------------------------------------------------------------------------------


class _Watch(NamedTuple):
    """The watched modules that ran in eager mode before the report, and those that should have, by path."""

    ran: set[str]
    owners: dict[str, tuple[str, nn.Module]]  # of each adapted module; the model may be changed before the report
    chosen: set[str]  # lists and dicts of modules, which never run: their owner chooses among their entries


def watch(model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
    """Watch ``model`` run, to warn about adapted modules that did not run although their owner did.

    The warning comes after the next eager forward of the whole model, or at an optimizer step if that is earlier: a
    custom loop may call only parts of the model. A layer triggers none if its owner is skipped too, as by LayerDrop, or
    if another module in the same list or dict ran: its owner chose among them.
    """
    _unwatch(model)
    if not adapted:
        return
    lists = {path for path in map(parent, adapted) if isinstance(model.get_submodule(path), _LISTS)}
    owners = {path: _owner(model, parent(path)) for path in adapted}
    watched = vars(model)[WATCHED] = _Watch(set(), owners, lists)  # first, so that `_unwatch` undoes a half
    for path, module in {**adapted, **dict(owners.values())}.items():
        module.register_forward_pre_hook(functools.partial(note_call, watched.ran, path))
    model.register_forward_hook(report)


def _unwatch(model: nn.Module) -> None:
    if WATCHED in vars(model):
        for module in model.modules():
            torch_private.remove_hooks_(module, note_call, report)
        vars(model).pop(WATCHED, None)  # another thread may have been faster


def _owner(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Return the module at ``path``, or the closest one above that has a forward: a ModuleList never runs."""
    found = model.get_submodule(path)
    return _owner(model, parent(path)) if path and isinstance(found, _LISTS) else (path, found)


def note_call(ran: set[str], path: str, module: nn.Module, args: Any) -> None:
    """Add ``path`` to ``ran``: with these two bound, the forward pre-hook of watched modules."""
    # Not under compile: compiled code must not have a Python side effect in each call.
    if not torch.compiler.is_compiling():
        ran.add(path)


def note_used(model: nn.Module, paths: Iterable[str]) -> None:
    """Note that the adapters at ``paths`` have an effect, although their modules may never be called."""
    watched: _Watch | None = vars(model).get(WATCHED)
    if watched is not None:
        watched.ran.update(paths)


def report(model: nn.Module, *call: Any) -> None:
    """Warn once about adapters that never ran: the forward hook of the model, which a step also calls.

    It waits for a call in eager mode. A base that was replaced after wrapping raises `AdapterError`.
    """
    watched: _Watch | None = vars(model).get(WATCHED)
    if watched is None or torch.compiler.is_compiling() or not watched.ran:
        return
    due = [path for path, (owner, _) in watched.owners.items() if owner in watched.ran]
    if not due:
        return
    refuse_lost(tuners_of(model).values())
    _unwatch(model)
    used = {parent(path) for path in watched.ran.intersection(watched.owners)}.intersection(watched.chosen)
    silent = sorted(path for path in due if path not in watched.ran and parent(path) not in used)
    if silent:
        above = [watched.owners[path][1] for path in silent]
        owners = sorted({forward_name(owner) for owner in above})
        # How to get a plugin that may know them.
        known = next((f". {hint}" for hint in map(hooks.unserved, above) if hint), "")
        warn(
            f"these adapters never ran although the module that owns their base layer did: {', '.join(silent)}. "
            "Unless this forward did not need them, the owner uses the weight directly, bypassing the layer's "
            "forward(), and the adapter has no effect there. Leave these layers out (exclude=...), or install a plugin "
            f"that names the owner ({', '.join(owners)}) and these children through tunerkit_weight_readers"
            f"{known}"
        )


# --- Parameters of the base -------------------------------------------------------------------------------------------


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's own parameters by name."""
    return {name: tuple(whole_shape(parameter)) for name, parameter, _ in _base_parameters(model)}


def warn_of_base_changes(tuners: Sequence[Tuner], *, again: bool = True) -> None:
    """Warn, for each cause once, if the base under ``tuners``, adapters of one model, is trained or was resized.

    With ``again=False`` nothing is repeated that an earlier warning has said of this model.
    """
    base, told = list(_base_parameters(tuners[0].model)), wrapped_of(tuners[0].model).told
    thawed = [name for name, parameter, is_covered in base if parameter.requires_grad and not is_covered]
    resized: list[str] = []
    for shapes in (tuner.progress.shapes for tuner in tuners):
        for name, parameter, _ in base:
            shape = whole_shape(parameter)
            was = shapes.get(name, shape)
            if was != shape and parameter.is_floating_point():  # packing, as on the way to a GPU, is no resizing
                resized.append(f"{name} {list(was)} -> {list(shape)}")
    for names, text in ((thawed, _THAWED), (list(dict.fromkeys(resized)), _RESIZED)):
        if names and (again or not told.issuperset(names)):
            modules = list(dict.fromkeys(parent(name) or name for name in names))[:_SHOWN]
            warn(text.format(listed=few(names, shown=_SHOWN), modules=modules))
            told.update(names)


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yield the base's own parameters by name, and whether a trained copy of their module is used instead."""
    copied: set[str] = set()
    for path, module, slots in places_in(model):
        if slots is not None and slots.copies:
            copied.add(path)
        is_covered = is_under(path, copied)
        for name, parameter in torch_private.own_parameters(module).items():
            if parameter is not None:
                yield join(path, name), parameter, is_covered


_THAWED = (
    "parameters of the base require gradients: {listed}. If they are trained, no adapter's file holds their values, "
    "and the file fits no other base. To keep them in the adapter, name their modules when you wrap, as in "
    "train_modules={modules}, or set bias for biases. Otherwise freeze them, or " + _SAVE_BASE
)
_RESIZED = (
    "parameters of the base have been resized since the adapter was put in: {listed}. No adapter's file holds new "
    "rows, and the file fits only a base with the same ones. Resize the model before tunerkit.wrap, and name the "
    "embeddings in train_modules to train the new rows; or " + _SAVE_BASE
)
