"""Read the tensors of a type of PEFT's by the names that a method declares."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import FileError, exact_patterns, file_matchers, method_record
from tunerkit_peft.declarations import Convert, Declaration, Declared, Leaf, Size
from tunerkit_peft.declared_settings import TableSettings
from tunerkit_peft.lora_reading import agreed, matched
from tunerkit_peft.paths import NO_MERGE, Moved, Place, caveats, place_of, refuse_convolutions, tied_to_input
from tunerkit_peft.settings import refuse
from tunerkit_peft.shapes import Features, features_of, misfit, ours, shape_of
from tunerkit_peft.tensors import Adapted, Kind, Read, Turned, Weights

_AGAIN: Final = "shared "  # PEFT saves some shared tensors at each target as well


def kind_of(names: Declaration) -> Kind:
    """Return how the tensors of a type are known."""
    leaves = [(own, name) for own, leaf in names.tensors.items() for name in leaf.names]
    leaves += [(_AGAIN + own, name) for own, leaf in names.shared.items() for name in leaf.names if "*" not in name]
    leaves += [(OTHER + name, name) for name in names.others]
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


_LAYERS: Final = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
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
        sizes: The sizes that the tensors agree on.
    """

    place: Place
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[Size, ...] | None]
    features: Features | None
    sizes: dict[str, int] = attrs.field(factory=dict)


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
    weights = as_declared(weights, names)
    places = {name: place_of(name, moved.rename) for name in weights.factors}
    refuse_convolutions(weights.file, modules, [place.path for place in places.values()], names.type, NO_MERGE)
    rules = _rules(settings, [place.owner for place in places.values()])
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
        found.append(at)
        if module is not None and not names.takes(module):
            continue  # as `_other_classes` says
        wrong, misfits = _misshapen(weights, at)
        damaged += wrong
        others += misfits
        if not wrong:
            unexplained += _unexplained(settings, at, rules)
    if settings.drawn and not names.shared.keys() <= weights.shared.keys():
        refuse(settings.common.file, settings.drawn)
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
        contradictions=[] if tied else list(_other_classes(settings.declared, found, modules)),
        mismatches=others,
        read=lambda: (
            _all_tied(_read(settings, weights, found[:1], chosen, rules), names, tied)
            if tied
            else _read(settings, weights, found, chosen, rules)
        ),
        remarks=(
            *settings.remarks,
            *caveats([(at.place.path, modules.get(at.place.path)) for at in found], names.type),
        ),
        beside=tied,
    )


def _rules(settings: TableSettings, owners: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """The values of PEFT's patterns at each target, by our name of the setting."""
    names, file = settings.declared.names, settings.common.file
    return {own: matched(file, names.settings[own].pattern, table, owners) for own, table in settings.patterns.items()}


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


def _misshapen(weights: Weights, at: _At) -> tuple[list[str], list[str]]:
    """What contradicts itself, and what another base model would explain. The sizes are filled."""
    wrong: list[str] = []
    others: list[str] = []
    for part, key in at.keys.items():
        expected = at.shapes[part]
        if expected is None or at.features is None:
            continue
        problem, is_base = misfit(weights.shape(key), expected, at.features, at.sizes)
        if problem:
            (others if is_base else wrong).append(f"{shown(key)} {problem}")
    return wrong, others


def _unexplained(settings: TableSettings, at: _At, rules: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, size in at.sizes.items():
        setting, wanted = settings.declared.names.settings.get(name), settings.config.get(name)
        if setting is None or setting.measured:
            continue
        allowed = set(rules.get(name, {}).get(at.place.owner, {}).values()) or {wanted}
        if size not in allowed and all(isinstance(each, int) and not isinstance(each, bool) for each in allowed):
            has_table = bool(settings.patterns.get(name))
            say = f"{setting.name[0]!r}{f' and {setting.pattern!r} say' if has_table else ' says'}"
            sizes = " or ".join(map(str, sorted(allowed)))
            yield f"{shown(next(iter(at.keys.values())))} has {name} {size}; {say} {sizes}"


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
    """The paths of the input's embedding and what is tied to it, if the type adapts these as one, and no others.

    It does where the embedding is a target: PEFT changes a head alone without it.
    """
    sides, paths = [*tied_to_input(modules)] if names.tied else [], {at.place.path for at in found}
    return sides if paths <= {*sides} and paths.issuperset(sides[:1]) else []


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


def _other_classes(declared: Declared, found: Sequence[_At], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    names = declared.names
    only_norms = method_record(declared.method).targets == "norms"
    merge = "merge the adapter in PEFT (merge_and_unload), and use the merged model as the base"
    for at in found:
        if (module := modules.get(at.place.path)) is None:
            continue
        kind = type(module).__name__
        belongs = f"{next(iter(at.keys.values()))} belongs to {'an' if kind[0] in 'AEIOU' else 'a'} {kind} here"
        if not names.takes(module) or at.place.times != 1:
            layers = ", ".join(names.layers)
            yield f"{belongs}, and the names that are declared for PEFT's {names.type} are for {layers}; {merge}"
        elif only_norms and isinstance(module, _LAYERS):
            yield f"{belongs}, which PEFT trains in full, and method {declared.method!r} adapts norms alone; {merge}"


def _read(
    settings: TableSettings,
    weights: Weights,
    found: Sequence[_At],
    chosen: Mapping[str, Sequence[str]],
    rules: Mapping[str, Mapping[str, dict[str, Any]]],
) -> Read:
    names = settings.declared.names
    exact = exact_patterns([at.place.path for at in found])
    config = {**settings.config, **{own: [exact[path] for path in paths] for own, paths in chosen.items()}}
    for own, setting in names.settings.items():
        if not (setting.measured or settings.patterns.get(own)):
            continue
        values = {at.place.path: _value(settings, own, at, rules.get(own, {})) for at in found}
        config[own] = common = Counter(values.values()).most_common(1)[0][0]
        if setting.pattern:
            config[f"{own}_pattern"] = {exact[path]: value for path, value in values.items() if value != common}
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


def _value(settings: TableSettings, own: str, at: _At, rules: Mapping[str, dict[str, Any]]) -> Any:
    """The value of a setting at a target: as its tensors say, or the settings."""
    if own in at.sizes:
        return at.sizes[own]
    field, owner = settings.declared.names.settings[own].pattern, at.place.owner
    return agreed(settings.common.file, field, rules.get(owner, {}), owner, settings.config[own])


def _shared(names: Declaration, own: str, tensor: Tensor) -> Tensor:
    leaf = names.shared.get(own) or names.shared[next(name for name in names.shared if _covers(name, own))]
    return ours(tensor, leaf, leaf.shape, Features(0, ()))


def _covers(name: str, own: str) -> bool:
    return name.endswith("*") and own.startswith(name.removesuffix("*"))


OTHER: Final = "other "  # before the names of parts that the declared form does not have


def as_declared(weights: Weights, names: Declaration) -> Weights:
    """Return the tensors with those of other forms turned into the declared one, once they are asked for.

    Raises:
        FileError: A tensor of such a form is missing, or they do not fit together.
    """
    factors: dict[str, dict[str, str]] = {}
    turned: dict[str, Turned] = {}
    for path, keys in weights.factors.items():
        own = factors[path] = {part: key for part, key in keys.items() if not part.startswith(OTHER)}
        other = {part.removeprefix(OTHER): key for part, key in keys.items() if part.startswith(OTHER)}
        if not other:
            continue
        written = {leaf.name[0]: own[part] for part, leaf in names.tensors.items() if part in own}
        turn = partial(_turned, weights, {**written, **other}, names.others[next(iter(other))])
        try:
            made = turn(shapes_alone=True)  # they are compared before anything is computed
        except (KeyError, RuntimeError) as error:
            key, lacks = next(iter(other.values())), isinstance(error, KeyError)
            problem = f"is there without its {error.args[0]}" if lacks else "does not fit the layer's other tensors"
            raise FileError(f"{weights.file} is damaged or incomplete:\n- {shown(key)} {problem}") from error
        changed = {name: key for name, key in written.items() if name in made}
        turned |= {key: Turned(tuple(made[name].shape), partial(_one, turn, name)) for name, key in changed.items()}
    return attrs.evolve(weights, factors=factors, turned=turned)


def _turned(
    weights: Weights, keys: Mapping[str, str], convert: Convert, *, shapes_alone: bool = False
) -> Mapping[str, Tensor]:
    if shapes_alone:
        return convert({name: torch.empty(weights.shape(key), device="meta") for name, key in keys.items()})
    return convert({name: weights.tensor(key).float() for name, key in keys.items()})


def _one(turn: Callable[[], Mapping[str, Tensor]], name: str) -> Tensor:
    return turn()[name]
