"""Gives modules that share a parameter one each while they are merged, and the shared one back afterwards.

Adapters at all sides of a tie make different weights of it. The shared Parameter object is set aside with its values.
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
    """A module that holds a shared parameter, and the one that it gets instead. Several in one place get the same."""

    module: nn.Module
    name: str
    shared: nn.Parameter
    own: nn.Parameter


@attrs.frozen(eq=False)
class Parting:
    """How one adapted module gets out of its ties, and in again."""

    holders: tuple[_Holder, ...]  # at or in the module, of parameters shared with modules elsewhere
    flags: tuple[tuple[object, str], ...]  # objects, and their attributes that are True while weights are tied

    def set_(self, *, apart: bool) -> None:
        """Give the module parameters of its own, or put the shared Parameter objects back."""
        for holder in self.holders:
            torch_private.own_parameters(holder.module)[holder.name] = holder.own if apart else holder.shared
        for owner, name in self.flags:
            setattr(owner, name, not apart)


def plan_parting(model: nn.Module, places: Places, merged: Sequence[dict[str, Any]]) -> list[Parting | None]:
    """Plan how modules get out of their ties, changing nothing in the model; None where nothing merged is shared.

    A module leaves all its ties: what is not merged gets an equal tensor of its own, added to ``merged`` there.
    """
    shared = targets.tied(injection.base_modules(model))
    if not shared:
        return [None] * len(places)
    _refuse_left_out(places, merged, shared)
    found = [
        _holders(module, tensors, shared) if slots.active else ()
        for (_, module, slots), tensors in zip(places, merged, strict=True)
    ]
    # A place leaves as a whole: what is tied inside it stays so.
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
    """Raise `AdapterError` if a parameter to merge is shared, since wrapping, and its sides cannot get one each."""
    active = {path for path, _, slots in places if slots.active}
    for (path, module, _), tensors in zip(places, merged, strict=True):
        own = dict(module.named_parameters(remove_duplicate=False))
        found = [(own[name], shared.get(id(own[name]), ())) for name in tensors if name in own]
        if others := [name for _, names in found for name in targets.left_out(names, active)]:
            raise AdapterError(
                f"cannot merge into {path!r}: it is tied to {', '.join(others)} by now, and merging would change that "
                "too; give each a parameter of its own first"
            )
        for parameter, names in found:
            if type(parameter) is not nn.Parameter and not all(is_under(name, (path,)) for name in names):
                raise AdapterError(
                    f"cannot merge into {path!r}: {', '.join(names)} are one {type(parameter).__name__}, which cannot "
                    "be split. Load the adapter onto the base in full precision and merge there"
                )


def _holders(module: nn.Module, tensors: dict[str, Any], shared: Mapping[int, tuple[str, ...]]) -> tuple[_Holder, ...]:
    """The parameters that a place shares with modules elsewhere; empty if none is among the merged ``tensors``."""
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
    """The "tied" flags of the modules around parted weights, if nothing in these modules stays tied."""
    if unserved := hooks.unserved(model, described=True):
        warn(
            f"tied weights of this {type(model).__name__} get values of their own, and its config still says that they "
            f"are tied: {unserved}"
        )
    libraries = hooks.gather_libraries()
    for path, module in injection.base_modules(model):
        if any(_holds(path, tie) for tie in parted) and not any(_holds(path, tie) for tie in left):
            for name in (flag for library in libraries for flag in library.tied_flags(module)):
                owner, _, flag = name.rpartition(".")
                yield (operator.attrgetter(owner)(module) if owner else module), flag


def _holds(path: str, names: Sequence[str]) -> bool:
    return not path or all(is_under(name, (path,)) for name in names)
