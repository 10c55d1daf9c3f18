"""Untie modules that share a parameter while they are merged, and tie them again afterwards.

The merged weights of tied modules differ, so each gets its own Parameter; the shared one is kept until the unmerge.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from tunerkit import hooks, injection, targets
from tunerkit.errors import AdapterError, warn
from tunerkit.injection import Slots
from tunerkit.layers import torch_private
from tunerkit.paths import is_under, join

Places = Sequence[tuple[str, nn.Module, Slots]]  # as `injection.walk` returns them


@attrs.frozen(eq=False)
class _Holder:
    """A module's shared parameter, and the new parameter that replaces it in all modules inside one target."""

    module: nn.Module
    name: str
    shared: nn.Parameter
    own: nn.Parameter


@attrs.frozen(eq=False)
class Parting:
    """The untying of one adapted module, which can be reverted."""

    holders: tuple[_Holder, ...]  # this module and its children that share parameters with modules outside it
    flags: tuple[tuple[object, str], ...]  # (object, attribute) pairs that are True while weights are tied

    def set_(self, *, apart: bool) -> None:
        """Untie the module's parameters (``apart``), or put the shared Parameter objects back."""
        for holder in self.holders:
            torch_private.own_parameters(holder.module)[holder.name] = holder.own if apart else holder.shared
        for owner, name in self.flags:
            setattr(owner, name, not apart)


def plan_parting(model: nn.Module, places: Places, merged: Sequence[dict[str, Any]]) -> list[Parting | None]:
    """Return the untying of each module, or None if its merged tensors are not tied. The model is not changed.

    All ties of a module to others are cut: for tied tensors that are not merged, clones are added to ``merged``.
    """
    shared = targets.tied(injection.base_modules(model))
    if not shared:
        return [None] * len(places)
    _refuse_left_out(places, merged, shared)
    found = [
        _holders(module, tensors, shared) if slots.active else ()
        for (_, module, slots), tensors in zip(places, merged, strict=True)
    ]
    # Each target leaves its ties as a whole: ties inside it stay.
    apart = [Counter(id(holder.shared) for holder in holders) for holders in found]
    parted, left = set(), set()
    for key, names in shared.items():
        groups = [own[key] for own in apart]
        if any(groups):
            parted.add(names)
        if max([len(names) - sum(groups), *groups]) > 1:
            left.add(names)
    flags = tuple(_tied_flags(model, parted, left)) if parted else ()
    return [Parting(holders, flags) if holders else None for holders in found]


def _refuse_left_out(
    places: Places, merged: Sequence[Mapping[str, Any]], shared: Mapping[int, tuple[str, ...]]
) -> None:
    """Raise `AdapterError` if a tensor to merge became tied after wrapping, or if its class cannot be untied."""
    active = {path for path, _, slots in places if slots.active}
    for (path, module, _), tensors in zip(places, merged, strict=True):
        own = dict(module.named_parameters(remove_duplicate=False))
        found = [(own[name], shared.get(id(own[name]), ())) for name in tensors if name in own]
        if others := [name for _, names in found for name in targets.left_out(names, active)]:
            raise AdapterError(
                f"cannot merge into {path!r}: after wrapping it was tied to {', '.join(others)}, which merging would "
                "change too; give each a parameter of its own first"
            )
        for parameter, names in found:
            if type(parameter) is not nn.Parameter and not all(is_under(name, (path,)) for name in names):
                raise AdapterError(
                    f"cannot merge into {path!r}: {', '.join(names)} share one {type(parameter).__name__}, which "
                    "cannot be untied. Load the adapter onto the base in full precision and merge there"
                )


def _holders(module: nn.Module, tensors: dict[str, Any], shared: Mapping[int, tuple[str, ...]]) -> tuple[_Holder, ...]:
    """Return a holder for each parameter that ``module`` shares; empty if no module that has one of them is merged."""
    held: dict[int, dict[str, tuple[nn.Module, str]]] = defaultdict(dict)
    parameters = {}
    for path, part in injection.base_modules(module):
        for name, parameter in torch_private.own_parameters(part).items():
            if parameter is not None and id(parameter) in shared:
                parameters[id(parameter)] = parameter
                held[id(parameter)][join(path, name)] = (part, name)
    crossing = {key: names for key, names in held.items() if len(names) < len(shared[key])}
    if not any(names.keys() & tensors.keys() for names in crossing.values()):
        return ()
    holders = []
    for key, names in crossing.items():
        parameter = parameters[key]
        if names.keys().isdisjoint(tensors):
            tensors[next(iter(names))] = parameter.detach().clone()
        own = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        holders += [_Holder(part, name, parameter, own) for part, name in names.values()]
    return tuple(holders)


def _tied_flags(
    model: nn.Module, parted: set[tuple[str, ...]], left: set[tuple[str, ...]]
) -> Iterator[tuple[object, str]]:
    """Yield (object, attribute) of each flag that marks weights as tied, for modules in which all ties are cut."""
    if unserved := hooks.unserved(model, described=True):
        warn(
            f"the merge gives tied weights of this {type(model).__name__} different values, but its config still marks "
            f"them as tied: {unserved}"
        )
    libraries = hooks.libraries_of(model)
    for path, module in injection.base_modules(model):
        if any(_holds(path, tie) for tie in parted) and not any(_holds(path, tie) for tie in left):
            for name in (flag for library in libraries for flag in library.tied_flags(module)):
                owner, _, flag = name.rpartition(".")
                yield (operator.attrgetter(owner)(module) if owner else module), flag


def _holds(path: str, names: Sequence[str]) -> bool:
    return not path or all(is_under(name, (path,)) for name in names)
