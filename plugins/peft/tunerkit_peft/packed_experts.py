"""Take what belongs to stacks of experts out of a LoRA's tensors: PEFT's packed matrices, and those of single experts.

Which parameter a packed matrix belongs to follows from its depth: the wrapper of an experts module's first parameter in
``target_parameters`` is the innermost one. Which side it belongs to has changed twice, see `Stack.is_swapped`.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial

import attrs
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import BaseMismatchError, FileError
from tunerkit_peft.paths import Place, Rename
from tunerkit_peft.settings import Settings
from tunerkit_peft.single_experts import Single, as_stacks, single_of
from tunerkit_peft.stacks import LEVEL, Stack, own_parameters, stacks_of, unpacked
from tunerkit_peft.targets import few, is_named
from tunerkit_peft.tensors import Parts, Turned, Weights, wrong_parts

_UNKNOWN = (
    "Install tunerkit[experts], or describe the class of these experts to it (tunerkit_experts.describe); or merge the "
    "adapter in PEFT (merge_and_unload), and use the merged model as the base"
)


@attrs.frozen(eq=False)
class _Packed:
    """The packed matrices of one stack: the names of their tensors by part, and the module's path in the file."""

    stack: Stack
    names: Mapping[str, str]
    experts: str


def experts_around(names: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of a file with those of stacks replaced by that of their experts module."""
    experts = {stack.experts for stack in stacks_of(modules).values()}
    return list(dict.fromkeys(name if name in modules else _around(name, experts) for name in names))


def split_stacks(
    settings: Settings, weights: Weights, modules: Mapping[str, nn.Module], rename: Rename
) -> tuple[Weights, list[Parts]]:
    """Split the tensors of a LoRA.

    Args:
        settings: The adapter's settings.
        weights: Its tensors.
        modules: The model's modules.
        rename: The paths of the file in the model.

    Returns:
        The tensors without the factors at stacks, and the parts at stacks. Their A is (E, r, in) and B is (E, out, r).

    Raises:
        FileError: Tensors are missing, or nothing says which parameter or which side they belong to.
        BaseMismatchError: They have other sizes than the model's experts.
    """
    groups: dict[str, list[Stack]] = defaultdict(list)
    for stack in stacks_of(modules).values():
        groups[stack.experts].append(stack)
    rest: dict[str, dict[str, str]] = {}
    levels: dict[str, dict[int, Mapping[str, str]]] = defaultdict(dict)
    singles: list[Single] = []
    for name, keys in weights.factors.items():
        bare = _bare(name)
        single = None if rename(name) in modules else single_of(name, keys, groups, rename)
        if rename(bare) in groups:
            levels[bare][(len(name) - len(bare)) // len(LEVEL)] = keys
        elif single is not None:
            singles.append(single)
        else:
            rest[name] = keys
    _refuse_unknown(settings, weights, rest, modules, rename)
    if damaged := [line for own in levels.values() for keys in own.values() for line in _damaged(settings, keys)]:
        raise FileError("\n- ".join([f"{weights.file} is damaged or incomplete:", *first(damaged)]))
    packed = [
        each
        for bare, own in levels.items()
        for each in _named(settings, weights, bare, modules[rename(bare)], groups[rename(bare)], own)
    ]
    _refuse_lost(settings, weights, groups, levels, rename)
    parts, turned = _unpacked(settings, weights, packed)
    others, joined = as_stacks(settings, weights, singles)
    made = {**weights.turned, **turned, **joined}
    return attrs.evolve(weights, factors=rest, turned=made), [*parts, *others]


def _bare(name: str) -> str:
    while name.endswith(LEVEL):
        name = name.removesuffix(LEVEL)
    return name


def _around(name: str, experts: Collection[str]) -> str:
    ends = {path.rpartition(".")[2] for path in experts}
    found, bare = Single.match(name, experts), _bare(name)
    if found is not None and found["experts"].rpartition(".")[2] in ends:
        return found["experts"]
    return bare if bare.rpartition(".")[2] in ends else name


def _damaged(settings: Settings, keys: Mapping[str, str]) -> Iterator[str]:
    yield from wrong_parts(keys, ("A", "B"), settings.common.file)


def _refuse_unknown(
    settings: Settings,
    weights: Weights,
    rest: Mapping[str, object],
    modules: Mapping[str, nn.Module],
    rename: Rename,
) -> None:
    """Refuse parameters of several matrices, which no plugin stands for."""
    unknown = [
        name
        for name in rest
        if name.endswith(LEVEL) or any(True for _ in _several(settings, _bare(name), modules.get(rename(name))))
    ]
    if unknown:
        raise FileError(
            "\n- ".join(
                [
                    f"{weights.file}: 'target_parameters' in {settings.common.file.name} is "
                    f"{shown([*settings.parameters])}, and here no plugin knows the parameters of these modules as "
                    f"stacks of experts. {_UNKNOWN}:",
                    *first([_bare(name) for name in unknown]),
                ]
            )
        )


def _several(settings: Settings, path: str, module: nn.Module | None) -> Iterator[str]:
    own = {} if module is None else dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        if parameter.ndim > 2 and is_named(f"{path}.{name}", settings.parameters):
            yield name


def _named(
    settings: Settings,
    weights: Weights,
    experts: str,
    module: nn.Module,
    stacks: Iterable[Stack],
    levels: Mapping[int, Mapping[str, str]],
) -> Iterator[_Packed]:
    """Yield the stacks of one experts module with their matrices, by the depth of these."""
    known = {stack.parameter: stack for stack in stacks}
    names = [name for name in own_parameters(module) if is_named(f"{experts}.{name}", settings.parameters)]
    if sorted(levels) != [*range(len(names))] or not known.keys() >= {*names}:
        raise FileError(
            f"{weights.file} has adapters of {len(levels)} parameters of {experts!r}; 'target_parameters' in "
            f"{settings.common.file.name} names {few(names) or 'none'} of them, and the stacks of this model are "
            f"{few([*known])}. Use the settings that were saved with the tensors"
        )
    for depth, name in enumerate(reversed(names)):
        yield _Packed(known[name], levels[depth], experts)


def _refuse_lost(
    settings: Settings,
    weights: Weights,
    groups: Mapping[str, list[Stack]],
    levels: Mapping[str, object],
    rename: Rename,
) -> None:
    """Refuse a file without tensors for stacks that the settings name."""
    there = {rename(bare) for bare in levels}
    lost = [
        stack.owner
        for experts, stacks in groups.items()
        for stack in stacks
        if experts not in there and is_named(stack.owner, settings.parameters)
    ]
    if lost:
        raise FileError(
            f"{weights.file} is incomplete: it has no tensors for {few(lost)}, which 'target_parameters' in "
            f"{settings.common.file.name} names. Save the adapter again where it was trained, or copy the file again"
        )


def _unpacked(settings: Settings, weights: Weights, packed: Iterable[_Packed]) -> tuple[list[Parts], dict[str, Turned]]:
    sides = _sides(settings, weights, list(packed))
    parts, turned = [], {}
    for each, swapped in sides:
        stack, a, b = each.stack, each.names["A"], each.names["B"]
        rank = weights.shape(a)[0] // stack.count
        parts.append(
            Parts(
                Place(stack.path, f"{each.experts}.{stack.parameter}", times=1),
                name=stack.path,
                names=each.names,
                rank=rank,
                is_stack=True,
            )
        )
        read = partial(_factor, weights, each, swapped)
        turned[a] = Turned((stack.count, rank, stack.in_features), partial(read, 0))
        turned[b] = Turned((stack.count, stack.out_features, rank), partial(read, 1))
    return parts, turned


def _factor(weights: Weights, packed: _Packed, swapped: bool, side: int) -> Tensor:
    a, b = weights.tensor(packed.names["A"]), weights.tensor(packed.names["B"])
    return unpacked(a, b, packed.stack, swapped=swapped)[side].contiguous()


def _sides(settings: Settings, weights: Weights, packed: list[_Packed]) -> list[tuple[_Packed, bool]]:
    """Find for each stack whether PEFT took its last dimension for the input's: by shapes, else by PEFT's version."""
    by_shape: dict[str, bool] = {}
    wrong = []
    for each in packed:
        stack, a, b = each.stack, weights.shape(each.names["A"]), weights.shape(each.names["B"])
        fitting = {
            swapped for swapped in (False, True) if _fits(a, b, stack, straight=stack.is_straight(swapped=swapped))
        }
        if not fitting:
            wrong.append(
                f"{each.names['A']} is {[*a]} and {each.names['B']} is {[*b]}; {stack.count} experts of "
                f"{[stack.out_features, stack.in_features]} need [{stack.count} r, {stack.in_features}] and "
                f"[{stack.out_features}, {stack.count} r], or the same with the two sides swapped"
            )
        elif len(fitting) == 1:
            by_shape[stack.path] = fitting.pop()
    if wrong:
        base = f", {shown(settings.common.base)}" if settings.common.base else ""
        raise BaseMismatchError("\n- ".join([f"{weights.file} was made for another base model{base}:", *first(wrong)]))
    found = {*by_shape.values()}
    alike = found.pop() if len(found) == 1 else None
    sides = []
    for each in packed:
        swapped = by_shape.get(each.stack.path, alike)
        swapped = each.stack.is_swapped(settings.version) if swapped is None else swapped
        if swapped is None:
            raise FileError(
                f"{weights.file}: the experts at {each.stack.owner!r} are square, so their matrices fit on both sides, "
                f"and PEFT has swapped these between 0.18 and 0.19.1. {settings.common.file.name} has 'peft_version' "
                f"{shown(settings.version or None)}; write the release that saved the adapter there, such as '0.21.2'"
            )
        sides.append((each, swapped))
    return sides


def _fits(a: tuple[int, ...], b: tuple[int, ...], stack: Stack, *, straight: bool) -> bool:
    inputs, outputs = (stack.in_features, stack.out_features)[:: 1 if straight else -1]
    return len(a) == len(b) == 2 and a[0] == b[1] and a[0] % stack.count == 0 and (a[1], b[0]) == (inputs, outputs)
