"""Checks that a wrapped model is still what was wrapped, and that its adapters run.

Three things are found. A module was replaced or resized, or lost its hook: its adapters have no effect. A module is
never called, because its owner uses the weight directly. And the base itself is trained or was resized, which no
adapter's file holds.
"""

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import AdapterError, TunerkitWarning
from tunerkit.injection.models import base_modules, is_called, slots_of
from tunerkit.injection.slots import Slots, is_resized
from tunerkit.injection.tuner import Tuner, modules_in, slots_in, tuners_of, wrapped_of
from tunerkit.injection.weight_override import overridden_in
from tunerkit.layers import BaseLayer, forward_name, is_packed, torch_private, whole_shape
from tunerkit.paths import few, is_under, join, parent

# The attribute of a model that is watched, until its report.
WATCHED = "_tunerkit_calls"
_LISTS = (nn.ModuleList, nn.ModuleDict)
_SHOWN = 3
_SAVE_BASE = "save the base too, inside tunerkit.disabled(model), and load the adapter onto that"


# --- Modules that were replaced or changed ----------------------------------------------------------------------------


def refuse_lost(tuners: Iterable[Tuner]) -> None:
    """Raise `AdapterError` naming the modules that were replaced, resized or stripped of their hook after wrapping.

    An adapter has no effect there, or does not fit, and no forward would show it.
    """
    lost = dict.fromkeys(found for tuner in tuners for found in _lost(tuner))  # several adapters may lose one module
    if lost:
        grouped = {reason: [path for path, other in lost if other == reason] for _, reason in lost}
        lines = "\n".join(f"- {', '.join(paths)}: {reason}" for reason, paths in grouped.items())
        raise AdapterError(
            f"adapters have no effect, or do not fit, where the model was changed after wrapping:\n{lines}\n"
            "Convert, replace or resize modules first, then call tunerkit.wrap or tunerkit.load"
        )


def _lost(tuner: Tuner) -> Iterator[tuple[str, str]]:
    list(slots_in(tuner))  # raises if the adapter itself was removed from a module
    modules = [module for _, module in base_modules(tuner.model)]
    # By identity, not by path: a module that was put into DDP or a compiled module still runs.
    present = set(map(id, modules))
    overridden = overridden_in(modules)
    for path, module in modules_in(tuner).items():
        slots, kind = slots_of(module), type(module).__name__
        assert slots is not None
        if id(module) not in present:
            yield path, f"the {kind} that was adapted is not in the model any more"
        elif not is_called(module) and id(module) not in overridden:
            yield path, "its forward hook is gone"
        elif _was_packed(module, slots.base):
            yield path, f"the weight of the {kind} was quantised after it had been adapted"
        elif _is_resized(module, slots):
            yield path, f"the {kind} has another size than when it was adapted"


def _was_packed(module: nn.Module, base: BaseLayer | None) -> bool:
    """Whether the module has a packed weight by now, with which the kind that it was adapted as does not work."""
    packed = any(map(is_packed, torch_private.own_parameters(module).values()))
    return packed and base is not None and not base.matches(module)


def _is_resized(module: nn.Module, slots: Slots) -> bool:
    if slots.base is not None and slots.features is not None:
        return (slots.base.out_features, slots.base.in_features) != slots.features
    return any(is_resized(module, copy) for copy in slots.copies.values())


# --- Modules that are never called ------------------------------------------------------------------------------------


class Calls(NamedTuple):
    """What ran in eager mode before the report.

    Attributes:
        owner_ran: The paths of the adapted modules whose owner ran.
        called: The paths of the adapted modules that ran themselves.
        owners: The owner by the path of the container. The model may be changed before the report.
        lists: The paths of the containers that never run.
    """

    owner_ran: set[str]
    called: set[str]
    owners: dict[str, nn.Module]
    lists: set[str]


def watch(model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
    """Watch ``model`` run, to warn about adapted modules that did not run although their owner did.

    The warning comes after the next eager forward of the whole model. It comes at an optimizer step if that is
    earlier: a custom loop may call only parts of the model.

    A layer that a branch or LayerDrop skips triggers no warning if its owner is skipped too. Nor does one in a list or
    dict of modules of which another ran: its owner chose among them.
    """
    _unwatch(model)
    if not adapted:
        return
    owners = {above: _running(model, above) for above in {parent(path) for path in adapted}}
    lists = {above for above in owners if isinstance(model.get_submodule(above), _LISTS)}
    calls = vars(model)[WATCHED] = Calls(set(), set(), owners, lists)  # first, so that `_unwatch` undoes a half
    for path, module in adapted.items():
        module.register_forward_pre_hook(functools.partial(note_call, calls.called, path))
        owners[parent(path)].register_forward_pre_hook(functools.partial(note_call, calls.owner_ran, path))
    model.register_forward_hook(report)


def _unwatch(model: nn.Module) -> None:
    if WATCHED in vars(model):
        for module in model.modules():
            torch_private.remove_hooks_(module, note_call, report)
        vars(model).pop(WATCHED, None)  # another thread may have been faster


def _running(model: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path``, or the closest one above that has a forward: a ModuleList never runs."""
    found = model.get_submodule(path)
    return _running(model, parent(path)) if path and isinstance(found, _LISTS) else found


def note_call(seen: set[str], path: str, module: nn.Module, args: Any) -> None:
    """Add ``path`` to ``seen``: with these two bound, the forward pre-hook of watched modules and their owners."""
    # Not under compile: compiled code must not have a Python side effect in each call.
    if not torch.compiler.is_compiling():
        seen.add(path)


def report(model: nn.Module, *call: Any) -> None:
    """Warn about what was seen of ``model``, once: its forward hook, which may also be called without a forward.

    If nothing has run in eager mode yet, the watch continues.

    Raises:
        AdapterError: The base was quantised, or otherwise replaced, after it had been wrapped. A loop that attaches
            nothing would train without these adapters.
    """
    calls: Calls | None = vars(model).get(WATCHED)
    if calls is None or not calls.owner_ran or torch.compiler.is_compiling():
        return
    refuse_lost(tuners_of(model).values())
    _unwatch(model)
    chosen_among = calls.lists.intersection(map(parent, calls.called))
    silent = sorted(path for path in calls.owner_ran - calls.called if parent(path) not in chosen_among)
    if silent:
        above = [calls.owners[parent(path)] for path in silent]
        owners = sorted({forward_name(owner) for owner in above})
        # How to get a plugin that may know them.
        known = next((f". {hint}" for hint in map(hooks.unserved, above) if hint), "")
        warnings.warn(
            f"these adapters never ran although the module that owns their base layer did: {', '.join(silent)}. "
            "Unless this forward did not need them, the owner uses the weight directly, bypassing the layer's "
            "forward(), and the adapter has no effect there. Leave these layers out (exclude=...), or install a plugin "
            f"that names the owner ({', '.join(owners)}) and these children through tunerkit_weight_readers"
            f"{known}",
            TunerkitWarning,
            stacklevel=3,
        )


# --- Parameters of the base -------------------------------------------------------------------------------------------


class _Own(NamedTuple):
    """A parameter of the base itself; ``covered`` if a trained copy of its module is used instead."""

    name: str
    parameter: nn.Parameter
    covered: bool


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's own parameters by name."""
    return {own.name: tuple(whole_shape(own.parameter)) for own in _base(model)}


def warn_of_base_changes(tuners: Sequence[Tuner], *, again: bool = True) -> None:
    """Warn, for each cause once, if the base under ``tuners``, adapters of one model, is trained or was resized.

    Args:
        tuners: The adapters.
        again: Whether to repeat what an earlier warning has said of this model.
    """
    base, told = list(_base(tuners[0].model)), wrapped_of(tuners[0].model).told
    thawed = [own.name for own in base if own.parameter.requires_grad and not own.covered]
    resized = list(dict.fromkeys(line for tuner in tuners for line in _resized(base, tuner.progress.shapes)))
    for names, text in ((thawed, _THAWED), (resized, _RESIZED)):
        if names and (again or not told.issuperset(names)):
            modules = list(dict.fromkeys(parent(name) or name for name in names))[:_SHOWN]
            listed = few(names, shown=_SHOWN)
            warnings.warn(text.format(listed=listed, modules=modules), TunerkitWarning, stacklevel=3)
            told.update(names)


def _resized(base: Sequence[_Own], before: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What has another shape than when an adapter was put in. Packing, as on the way to a GPU, is no resizing."""
    for name, parameter, _ in base:
        shape = whole_shape(parameter)
        was = before.get(name, shape)
        if was != shape and parameter.is_floating_point():
            yield f"{name} {list(was)} -> {list(shape)}"


def _base(model: nn.Module) -> Iterator[_Own]:
    copied: set[str] = set()
    for path, module in base_modules(model):
        slots = slots_of(module)
        if slots is not None and slots.copies:
            copied.add(path)
        covered = is_under(path, copied)
        for name, parameter in torch_private.own_parameters(module).items():
            if parameter is not None:
                yield _Own(join(path, name), parameter, covered)


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
