"""Checks that adapted modules are still in the model and unchanged, and that their adapters run."""

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

# The attribute of a watched model, until its report.
WATCHED = "_tunerkit_calls"
_LISTS = (nn.ModuleList, nn.ModuleDict)
_SHOWN = 3
_SAVE_BASE = "save the base too, inside tunerkit.disabled(model), and load the adapter onto the saved base"


# --- Modules that were replaced or changed ----------------------------------------------------------------------------


def refuse_lost(tuners: Iterable[Tuner]) -> None:
    """Raise `AdapterError` if an adapted module was replaced, resized or quantized after wrapping, or lost its hook."""
    lost = dict.fromkeys(found for tuner in tuners for found in _lost(tuner))  # several adapters may lose one module
    if lost:
        grouped = {reason: [path for path, other in lost if other == reason] for _, reason in lost}
        lines = "\n".join(f"- {', '.join(paths)}: {reason}" for reason, paths in grouped.items())
        raise AdapterError(
            f"the model was changed after wrapping, so that adapters have no effect or do not fit:\n{lines}\n"
            "Convert, replace or resize modules first, then call tunerkit.wrap or tunerkit.load"
        )


def _lost(tuner: Tuner) -> Iterator[tuple[str, str]]:
    slots_in(tuner)  # raises if the adapter itself was removed from a module
    modules, overridden = [module for _, module in base_modules(tuner.model)], None
    # By identity, not by path: modules inside DDP or a compiled module still run.
    present = set(map(id, modules))
    for path, module in modules_in(tuner).items():
        slots, kind = slots_of(module), type(module).__name__
        assert slots is not None
        if overridden is None and not is_called(module):  # a model of plain layers needs no search
            overridden = overridden_in(modules)
        base, weights = slots.base, torch_private.own_parameters(module).values()
        if id(module) not in present:
            yield path, f"the adapted {kind} is not in the model any more"
        elif not is_called(module) and id(module) not in (overridden or ()):
            yield path, "its forward hook is gone"
        elif base is not None and any(map(is_packed, weights)) and not base.matches(module):
            yield path, f"the weight of the {kind} was quantized after wrapping"
        elif slots.is_resized(module):
            yield path, f"the {kind} was resized after wrapping"


# --- Modules that are never called ------------------------------------------------------------------------------------


class _Watch(NamedTuple):
    """The state of `watch` for one model, until `report`. Modules are given by their paths."""

    ran: set[str]  # modules that ran in eager mode
    owners: dict[str, tuple[str, nn.Module]]  # the owner of each adapted module, from before any change of the model
    chosen: set[str]  # lists and dicts of modules, among whose entries an owner may choose


def watch(model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
    """Watch the next forward of ``model``, to warn about adapted modules that do not run although their parent does.

    The warning comes after the next eager forward of the whole model, or at an optimizer step if that is earlier, since
    a custom loop may call only parts of the model. It omits layers whose parent did not run either (LayerDrop), and
    layers in a ModuleList or ModuleDict of which another entry ran (experts).
    """
    _unwatch(model)
    if not adapted:
        return
    lists = {path for path in map(parent, adapted) if isinstance(model.get_submodule(path), _LISTS)}
    owners = {path: _owner(model, parent(path)) for path in adapted}
    watched = vars(model)[WATCHED] = _Watch(set(), owners, lists)  # first, so that `_unwatch` undoes a partial call
    for path, module in {**adapted, **dict(owners.values())}.items():
        module.register_forward_pre_hook(functools.partial(note_call, watched.ran, path))
    model.register_forward_hook(report)


def _unwatch(model: nn.Module) -> None:
    if WATCHED in vars(model):
        for module in model.modules():
            torch_private.remove_hooks_(module, note_call, report)
        vars(model).pop(WATCHED, None)  # another thread may have removed it


def _owner(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Return (path, module) at ``path``; for a ModuleList or ModuleDict, of its closest ancestor that is neither."""
    found = model.get_submodule(path)
    return _owner(model, parent(path)) if path and isinstance(found, _LISTS) else (path, found)


def note_call(ran: set[str], path: str, module: nn.Module, args: Any) -> None:
    """Forward pre-hook of the watched module at ``path``: add ``path`` to ``ran``, the modules that ran."""
    # Not under compile: compiled code must not have a Python side effect in each call.
    if not torch.compiler.is_compiling():
        ran.add(path)


def note_used(model: nn.Module, paths: Iterable[str]) -> None:
    """Mark the modules at ``paths`` as run, since their owner used their weights directly."""
    watched: _Watch | None = vars(model).get(WATCHED)
    if watched is not None:
        watched.ran.update(paths)


def report(model: nn.Module, *call: Any) -> None:
    """Warn once about adapters that never ran: a forward hook of the model, also called by an optimizer step.

    Compiled calls are ignored. Raises `AdapterError` if adapted modules were replaced after wrapping.
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
        known = next((f". {hint}" for hint in map(hooks.unserved, above) if hint), "")
        warn(
            f"these adapters never ran although the module that owns their base layer did: {', '.join(silent)}. "
            "Unless this forward skipped these layers, their owner uses the weight directly, bypassing the layer's "
            "forward(), and the adapters have no effect. Exclude these layers (exclude=...), or install a plugin that "
            f"lists the owner ({', '.join(owners)}) and these children in tunerkit_weight_readers{known}"
        )


# --- Parameters of the base -------------------------------------------------------------------------------------------


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's own parameters by name."""
    return {name: tuple(whole_shape(parameter)) for name, parameter, _ in _base_parameters(model)}


def warn_of_base_changes(tuners: Sequence[Tuner], *, again: bool = True) -> None:
    """Warn if parameters of the tuners' common base are trained, and if some were resized.

    With ``again=False``, a warning is omitted if earlier warnings have named all of its parameters.
    """
    base, told = list(_base_parameters(tuners[0].model)), wrapped_of(tuners[0].model).told
    thawed = [name for name, parameter, is_covered in base if parameter.requires_grad and not is_covered]
    resized: list[str] = []
    for shapes in (tuner.progress.shapes for tuner in tuners):
        for name, parameter, _ in base:
            was = shapes.get(name, parameter.shape)
            # A parameter may be partitioned and empty. Packing, as on the way to a GPU, is not a resize.
            if was != parameter.shape and was != (shape := whole_shape(parameter)) and parameter.is_floating_point():
                resized.append(f"{name} {list(was)} -> {list(shape)}")
    for names, text in ((thawed, _THAWED), (list(dict.fromkeys(resized)), _RESIZED)):
        if names and (again or not told.issuperset(names)):
            modules = list(dict.fromkeys(parent(name) or name for name in names))[:_SHOWN]
            warn(text.format(listed=few(names, shown=_SHOWN), modules=modules))
            told.update(names)


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yield (name, parameter, is_covered) for each parameter of the base; covered: an adapter trains a copy of it."""
    copied: set[str] = set()
    for path, module, slots in places_in(model):
        if slots is not None and slots.copies:
            copied.add(path)
        is_covered = is_under(path, copied)
        for name, parameter in torch_private.own_parameters(module).items():
            if parameter is not None:
                yield join(path, name), parameter, is_covered


_THAWED = (
    "parameters of the base require gradients: {listed}. Adapter files do not contain them, so if they are trained, "
    "the adapter fits only this base. To train them as part of the adapter, name their modules in tunerkit.wrap, as in "
    "train_modules={modules}, or set bias='adapters' or 'all' for biases. Otherwise freeze them, or " + _SAVE_BASE
)
_RESIZED = (
    "parameters of the base were resized after wrapping: {listed}. Adapter files do not contain new rows, so the "
    "adapter fits only this base. Resize the model before tunerkit.wrap, and name the embeddings in train_modules to "
    "train the new rows; or " + _SAVE_BASE
)
