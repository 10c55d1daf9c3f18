"""Read the tensors of a type of PEFT's by the names that a method declares."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import FileError, exact_patterns, file_matchers
from tunerkit_peft.declaration import Declaration, Leaf, Size
from tunerkit_peft.moving import Moved
from tunerkit_peft.places import Place, obstacle, place_of, tied_to_input
from tunerkit_peft.products import Adapted, Read
from tunerkit_peft.shapes import Features, features_of, misfit, ours, shape_of
from tunerkit_peft.table_settings import TableSettings
from tunerkit_peft.weights import Kind, Weights

_AGAIN: Final = "shared "  # PEFT saves some shared tensors at each target as well


def kind_of(names: Declaration) -> Kind:
    """Return how the tensors of a type are known."""
    leaves = [(own, name) for own, leaf in names.tensors.items() for name in leaf.names]
    leaves += [(_AGAIN + own, name) for own, leaf in names.shared.items() for name in leaf.names if "*" not in name]
    # The longer ones first: what follows a name may be an adapter's name, or a part of another name.
    patterns = [(own, _pattern(name)) for own, name in sorted(leaves, key=lambda each: -each[1].count("."))]

    def find(name: str) -> tuple[str, str] | None:
        for own, pattern in patterns:
            if found := pattern.fullmatch(name):
                return found["path"] or "", own
        return None

    def find_shared(name: str) -> str | None:
        for own, leaf in names.shared.items():
            for each in leaf.names:
                start = each.removesuffix("*")
                if each != start and name.startswith(start):
                    return own.removesuffix("*") + name.removeprefix(start)
                if name == each or name.rpartition(".")[0] == each:
                    return own
        return None

    integers = {own: _KINDS[leaf.integers] for own, leaf in names.tensors.items() if leaf.integers in _KINDS}
    return Kind(f"one {names.type}", leaves[0][1] if leaves else names.type, find, find_shared, integers)


_KINDS: Final = {"int8": "I8", "uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64"}


def _pattern(name: str) -> re.Pattern[str]:
    """A name below a module's path, also with an adapter's name in it."""
    start, _, rest = name.partition(".")
    return re.compile(rf"(?:(?P<path>.+)\.)?{re.escape(start)}(?:\.[^.]+)?{re.escape(f'.{rest}') if rest else ''}")


@attrs.frozen(eq=False)
class _At:
    """The tensors at one target.

    Attributes:
        place: Where it is.
        keys: The names in the file, by ours.
        shapes: The sizes that each should have; None for those that the method has here.
        features: The layer's; None if the model has no such module.
    """

    place: Place
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[Size, ...] | None]
    features: Features | None


def named_adapter(settings: TableSettings, weights: Weights, modules: Mapping[str, nn.Module], moved: Moved) -> Adapted:
    """Find the tensors of each target, and compare them with each other, with the settings and with the model.

    Args:
        settings: The adapter's settings.
        weights: Its tensors.
        modules: The model's modules.
        moved: The paths of the file in the model.

    Raises:
        FileError: Tensors are missing, contradict each other or the settings, or are at a module of another class.
    """
    names = settings.declared.names
    places = {name: place_of(name, moved.rename) for name in weights.factors}
    chosen = {own: _chosen(value, places.values()) for own, value in settings.chosen.items()}
    found: list[_At] = []
    damaged: list[str] = []
    unexplained: list[str] = []
    others: list[str] = []
    for name, keys in weights.factors.items():
        place = places[name]
        module = modules.get(place.path)
        damaged += _incomplete(names, keys, name)
        features = None if module is None else features_of(module)
        named = [setting for setting, paths in chosen.items() if place.path in paths]
        own = {part: key for part, key in keys.items() if not part.startswith(_AGAIN)}
        at = _At(place, own, {part: _sizes(names.tensors[part], features, named) for part in own}, features)
        sizes: dict[str, int] = {}
        wrong, misfits = _misshapen(weights, at, sizes)
        damaged += wrong
        others += misfits
        if not wrong:
            unexplained += _unexplained(settings, sizes, at)
        found.append(at)
    damaged += [f"{leaf.name[0]!r}, which all targets share, is missing" for leaf in _lacking(names, weights)]
    damaged += _different(weights)
    tied = _tied(names, found, modules)
    damaged += _parted(weights, found if tied else ())
    if damaged:
        raise FileError("\n- ".join([f"{weights.file} is damaged or incomplete:", *first(damaged)]))
    if unexplained:
        raise FileError(
            "\n- ".join(
                [
                    f"{weights.file} and {settings.common.file.name} do not belong together: the settings do not "
                    "explain these sizes. Use the settings that were saved with the tensors:",
                    *first(unexplained),
                ]
            )
        )
    return Adapted(
        paths=tied or [at.place.path for at in found],
        takes=names.takes,
        contradictions=[] if tied else list(_other_classes(names, found, modules)),
        mismatches=others,
        read=lambda: (
            _all_tied(_read(settings, weights, found[:1], chosen), names, tied)
            if tied
            else _read(settings, weights, found, chosen)
        ),
        remarks=settings.remarks,
    )


def _chosen(value: tuple[str, ...] | str, places: Iterable[Place]) -> list[str]:
    """The paths of the targets that PEFT's setting names: by bare ends of paths, or by an expression for all of one."""
    matches = file_matchers([value])[value] if isinstance(value, str) else lambda path: path.endswith(value)
    return [place.path for place in places if matches(place.owner)]


def _sizes(leaf: Leaf, features: Features | None, chosen: Sequence[str]) -> tuple[Size, ...] | None:
    return None if features is None else shape_of(leaf, features, chosen)


def _incomplete(names: Declaration, keys: Mapping[str, str], path: str) -> Iterator[str]:
    if lacking := [leaf.name[0] for own, leaf in names.tensors.items() if not leaf.optional and own not in keys]:
        there = next((key for part, key in keys.items() if not part.startswith(_AGAIN)), path)
        yield f"{shown(there)} is there without its {' and '.join(lacking)}"


def _misshapen(weights: Weights, at: _At, sizes: dict[str, int]) -> tuple[list[str], list[str]]:
    """What contradicts itself, and what another base model would explain. The sizes are filled."""
    wrong: list[str] = []
    others: list[str] = []
    for part, key in at.keys.items():
        expected = at.shapes[part]
        if expected is None or at.features is None:
            continue
        problem, is_base = misfit(weights.shape(key), expected, at.features, sizes)
        if problem:
            (others if is_base else wrong).append(f"{shown(key)} {problem}")
    return wrong, others


def _unexplained(settings: TableSettings, sizes: Mapping[str, int], at: _At) -> Iterator[str]:
    for name, size in sizes.items():
        wanted = settings.config.get(name)
        if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted != size:
            setting = settings.declared.names.settings[name].name[0]
            yield f"{shown(next(iter(at.keys.values())))} has {name} {size}; {setting!r} says {wanted}"


def _lacking(names: Declaration, weights: Weights) -> Iterator[Leaf]:
    for own, leaf in names.shared.items():
        if not leaf.optional and not any(part == own or _covers(own, part) for part in weights.shared):
            yield leaf


def _different(weights: Weights) -> Iterator[str]:
    """Shared tensors that a target has with other values."""
    for keys in weights.factors.values():
        for part, key in keys.items():
            name = part.removeprefix(_AGAIN)
            if name == part or name not in weights.shared:
                continue
            if not torch.equal(weights.tensor(key), weights.tensor(weights.shared[name])):
                yield f"{shown(key)} and {shown(weights.shared[name])} differ, and all targets share one"


def _tied(names: Declaration, found: Sequence[_At], modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of the input's embedding and what is tied to it, if the type adapts these as one, and no others."""
    sides = [*tied_to_input(modules)] if names.tied else []
    return sides if {at.place.path for at in found} <= {*sides} else []


def _parted(weights: Weights, found: Sequence[_At]) -> Iterator[str]:
    """Tensors that differ between modules that share them."""
    for part, key in ((part, key) for at in found[1:] for part, key in at.keys.items()):
        other = found[0].keys.get(part, key)
        if not torch.equal(weights.tensor(key), weights.tensor(other)):
            yield f"{shown(key)} and {shown(other)} differ, and their modules are tied"


def _all_tied(own: Read, names: Declaration, tied: Sequence[str]) -> Read:
    """An adapter at one module as that of all that are tied to it."""
    (tensors,) = own.tensors.values()
    return Read({}, {**own.config, names.tied: True}, {path: {} for path in tied}, tensors)


def _other_classes(names: Declaration, found: Sequence[_At], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for at in found:
        module = modules.get(at.place.path)
        if module is None:
            continue
        if not names.takes(module) or at.place.times != 1:
            yield (
                f"{next(iter(at.keys.values()))} belongs to a {type(module).__name__} here, and the names that are "
                f"declared for PEFT's {names.type} are for {', '.join(names.layers)}; merge the adapter in PEFT "
                "(merge_and_unload), and use the merged model as the base"
            )
        elif reason := obstacle(module, names.type):
            yield f"PEFT computes something else than a change of the weight of {at.place.path!r} ({reason})"


def _read(settings: TableSettings, weights: Weights, found: Sequence[_At], chosen: Mapping[str, Sequence[str]]) -> Read:
    names = settings.declared.names
    exact = exact_patterns([at.place.path for at in found])
    config = {**settings.config, **{own: [exact[path] for path in paths] for own, paths in chosen.items()}}
    tensors = {
        at.place.path: {
            part: ours(weights.tensor(key), names.tensors[part], at.shapes[part], at.features)
            for part, key in at.keys.items()
            if at.features is not None
        }
        for at in found
    }
    shared = {own: _shared(names, own, weights.tensor(key)) for own, key in weights.shared.items()}
    return Read({}, config, tensors, shared)


def _shared(names: Declaration, own: str, tensor: Tensor) -> Tensor:
    leaf = names.shared.get(own) or names.shared[next(name for name in names.shared if _covers(name, own))]
    return ours(tensor, leaf, leaf.shape, Features(0, ()))


def _covers(name: str, own: str) -> bool:
    return name.endswith("*") and own.startswith(name.removesuffix("*"))
