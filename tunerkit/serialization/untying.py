"""Gives modules that share a parameter one each while they are merged, and the shared one back afterwards.

Adapters at all sides of a tie make of one weight as many different ones. Each side therefore gets a parameter of its
own. The shared Parameter object is set aside with its values, so that unmerging puts the very same one back.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from tunerkit import hooks, injection, targets
from tunerkit.errors import AdapterError, warn
from tunerkit.extras import is_described
from tunerkit.injection import Slots
from tunerkit.layers import torch_private
from tunerkit.paths import is_under, join

Places = Sequence[tuple[str, nn.Module, Slots]]  # as `injection.walk` yields them
# The attribute of a merged module's slots with its `Parting`.
_PARTING = "_tunerkit_parting"


@attrs.frozen(eq=False)
class _Holder:
    """A module that holds a shared parameter, and the one that it gets instead. Several in one place get the same."""

    module: nn.Module
    name: str
    shared: nn.Parameter
    own: nn.Parameter


@attrs.frozen(eq=False)
class Parting:
    """How one adapted module gets out of its ties, and in again. Both may be repeated after an interrupt.

    Attributes:
        holders: The modules at or in the adapted module that hold a parameter shared with a module elsewhere.
        flags: Objects and the names of their attributes that say that weights are tied, which is not so while they are
            apart.
    """

    holders: tuple[_Holder, ...]
    flags: tuple[tuple[object, str], ...]

    def part_(self) -> None:
        """Give the module parameters of its own."""
        self._set_(apart=True)

    def tie_(self) -> None:
        """Put the shared Parameter objects back."""
        self._set_(apart=False)

    def _set_(self, *, apart: bool) -> None:
        for holder in self.holders:
            torch_private.own_parameters(holder.module)[holder.name] = holder.own if apart else holder.shared
        for owner, name in self.flags:
            setattr(owner, name, not apart)


def refuse_left_out(model: nn.Module, places: Places, merged: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise `AdapterError` if a parameter to merge is shared and its sides cannot get one each.

    A module without an active adapter was tied after wrapping: `tunerkit.wrap` and `tunerkit.load` accept a tied weight
    only at all sides. A packed weight is more than its values.
    """
    shared = targets.tied(injection.base_modules(model))
    active = {path for path, _, slots in places if slots.active}
    for (path, module, _), tensors in zip(places, merged, strict=True):
        own = dict(module.named_parameters(remove_duplicate=False)) if shared else {}
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


# Never in inference mode: the parameters stay in the model after tunerkit.unwrap.
@torch.inference_mode(False)
@torch.no_grad()
def plan_parting(model: nn.Module, places: Places, merged: Sequence[dict[str, Tensor]]) -> list[Parting | None]:
    """Plan how modules get out of their ties, changing nothing in the model.

    A module that gets out leaves all its ties: what is not merged stays equal, in a tensor of its own.

    Args:
        model: The model.
        places: Its adapted modules.
        merged: The merged tensors of each by name. The tensors of parameters that only leave a tie are added.

    Returns:
        One plan for each place; None where nothing is shared with a module elsewhere, or nothing shared is merged.
    """
    shared = targets.tied(injection.base_modules(model))
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
    flags = tuple(_tied_flags(model, parted, left))
    return [Parting(holders, flags) if holders else None for holders in found]


def _holders(
    module: nn.Module, tensors: dict[str, Tensor], shared: Mapping[int, tuple[str, ...]]
) -> tuple[_Holder, ...]:
    """What a place shares with modules elsewhere; empty if none of it is among the merged ``tensors``."""
    held: dict[int, list[tuple[nn.Module, str, nn.Parameter]]] = defaultdict(list)
    full: dict[int, list[str]] = defaultdict(list)
    for path, part in injection.base_modules(module) if shared else ():
        for name, parameter in torch_private.own_parameters(part).items():
            if parameter is not None and id(parameter) in shared:
                held[id(parameter)].append((part, name, parameter))
                full[id(parameter)].append(join(path, name))
    crossing = [key for key, own in held.items() if len(own) < len(shared[key])]
    if not any(name in tensors for key in crossing for name in full[key]):
        return ()
    holders = []
    for key in crossing:
        parameter = held[key][0][2]
        if not any(name in tensors for name in full[key]):
            tensors[full[key][0]] = parameter.detach().clone()
        own = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        holders += [_Holder(part, name, parameter, own) for part, name, _ in held[key]]
    return tuple(holders)


def _tied_flags(
    model: nn.Module, parted: set[tuple[str, ...]], left: set[tuple[str, ...]]
) -> Iterator[tuple[object, str]]:
    """The flags that say "tied" of the modules around what is parted, if nothing in these modules stays tied.

    One flag stands for all ties of such a module: its library reads and writes what stays tied only if it is set.
    """
    libraries = hooks.gather_libraries() if parted else ()
    if parted and is_described(model) and (unserved := hooks.unserved(model)):
        warn(
            f"tied weights of this {type(model).__name__} get values of their own, and its config still says that they "
            f"are tied: {unserved}"
        )
    for path, module in injection.base_modules(model) if libraries else ():
        if any(_holds(path, tie) for tie in parted) and not any(_holds(path, tie) for tie in left):
            for name in (flag for library in libraries for flag in library.tied_flags(module)):
                owner, _, flag = name.rpartition(".")
                yield (operator.attrgetter(owner)(module) if owner else module), flag


def _holds(path: str, names: Sequence[str]) -> bool:
    return not path or all(is_under(name, (path,)) for name in names)


def thaw_parted(model: nn.Module, plans: Sequence[Parting | None]) -> None:
    """Note the names of parted parameters where wrapping froze the shared one, so that unwrapping thaws all of them.

    ``named_parameters`` lists a shared parameter under its first name only. The others mean nothing while it is tied.
    """
    root = injection.wrapped_model(model)
    wrapped = injection.wrapped_of(root)
    shared = {id(holder.shared): set[str]() for plan in plans if plan is not None for holder in plan.holders}
    for name, parameter in root.named_parameters(remove_duplicate=False) if shared else ():
        if id(parameter) in shared:
            shared[id(parameter)].add(name)
    frozen = set(wrapped.frozen)
    also = [name for names in shared.values() if names & frozen for name in sorted(names - frozen)]
    wrapped.frozen = (*wrapped.frozen, *also)


def note_parting(slots: Slots, plan: Parting | None) -> None:
    """Keep the plan with a merged module, so that a deep copy or a pickle of the model has its own."""
    if plan is not None:
        vars(slots)[_PARTING] = plan


def parting_of(slots: Slots) -> Parting | None:
    """Return the plan that a module's merge keeps, if it was tied."""
    found: Parting | None = vars(slots).get(_PARTING)
    return found if slots.merged else None


def forget_parting(slots: Slots) -> None:
    """Drop the plan."""
    vars(slots).pop(_PARTING, None)
