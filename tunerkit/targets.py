"""Target selection: from a model and patterns to the places to adapt, changing nothing.

A plain name is a promise that its modules can be adapted, so anything in its way is an error. Globs, regular
expressions, ``"all-linear"`` and the defaults choose broadly: what they leave out is told by one warning.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import attrs
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from tunerkit.architectures import default_names
from tunerkit.errors import TargetError, TunerkitWarning, closest
from tunerkit.obstacles import obstacle_at, weight_obstacle
from tunerkit.patterns import Matcher, is_broad, matcher
from tunerkit.records import Target
from tunerkit.survey import (
    Place,
    Survey,
    default_convolutions,
    is_linear,
    is_number,
    is_under,
    join,
    layer_number,
    may_be_linear,
    survey,
    tied,
)

ALL_LINEAR = "all-linear"


@attrs.define(eq=False)
class _Findings:
    """What the patterns led to: ``found`` by path, problems, and by reason the paths left out and those in the way."""

    found: dict[str, Place] = attrs.Factory(dict)
    problems: list[str] = attrs.Factory(list)
    left_out: dict[str, str] = attrs.Factory(dict)
    refused: dict[str, str] = attrs.Factory(dict)


@attrs.frozen(eq=False)
class _Scope:
    """The part of the model the caller wants: without ``excluded``, in ``layers`` if given."""

    excluded: Collection[str]
    layers: Collection[int] | None
    trained: Collection[str]
    adaptable: Collection[int]  # ids of modules: asking every plugin about a module is not free
    stacks: Sequence[str] = ()  # names of parameters that are stacks of matrices

    def covers(self, place: Place) -> bool:
        in_layers = self.layers is None or layer_number(place.path) in self.layers
        return in_layers and not any(path in self.excluded for path in place.paths)

    def is_adaptable(self, place: Place) -> bool:
        return id(place.module) in self.adaptable

    def trains(self, place: Place) -> bool:
        return any(is_under(path, self.trained) for path in place.paths)


def select(
    model: nn.Module,
    *,
    targets: str | Sequence[str] | None,
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    is_adaptable: Callable[[nn.Module], bool],
    trained: Collection[str] = (),
) -> tuple[Target, ...]:
    """The targets that the patterns select, in the model's order.

    ``targets`` of None means the architecture's default; else the convolutions, where the blocks hold no linear layer
    (see `default_convolutions`); else ``"all-linear"``: every linear layer except output heads. ``exclude`` takes
    patterns too; a container it matches is excluded with all that is in it. ``layers`` keeps the targets whose path
    has one of these numbers as its first number. ``trained`` are paths of modules trained in full: no target lies at
    or under one. Raises `TargetError` naming every problem at once; warns once, naming what a broad pattern left out.
    """
    scanned = survey(model)
    findings = _Findings()
    adaptable = frozenset(id(place.module) for place in scanned.places if is_adaptable(place.module))
    scope = _Scope(_excluded(scanned, exclude, findings), layers, trained, adaptable)
    scope = attrs.evolve(scope, stacks=tuple(_stacks(scanned, scope)))
    if targets is None or ALL_LINEAR in _patterns(targets):
        _tell_root(model, findings, adaptable=is_adaptable(model))
    if targets is None:
        _choose_default(model, scanned, scope, findings)
    for pattern in () if targets is None else _patterns(targets):
        if pattern == ALL_LINEAR:
            _choose_linear(scanned, scope, findings, names=("*",))
        else:
            _choose_matching(scanned, scope, findings, pattern)
    _check_layers(scanned, scope, findings)
    problems = [*findings.problems, *_lines(findings.refused)]
    if not problems and not findings.found:
        problems = [_NOTHING, *_lines(findings.left_out)]
    if problems:
        raise TargetError("\n".join(problems))
    if findings.left_out:
        told = "\n  ".join(_lines(findings.left_out))
        warnings.warn(f"left out, neither adapted nor trained:\n  {told}", TunerkitWarning, stacklevel=3)
    return tuple(Target(place.path, place.module) for place in scanned.places if place.path in findings.found)


def resolve_modules(model: nn.Module, names: Sequence[str], *, what: str) -> tuple[str, ...]:
    """The paths of the modules that the patterns ``names`` match, in the model's order and the outermost only.

    ``what`` says in errors where the names come from (``"train_modules"``). Raises `TargetError` naming every
    pattern that matches nothing.
    """
    if not names:
        return ()
    scanned = survey(model)
    found: set[str] = set()
    problems = []
    for name in [names] if isinstance(names, str) else names:
        matched = _matching(scanned.places, matcher(name))
        found.update(place.path for place in matched)
        if not matched:
            problems.append(f"{what}: {_unknown(name, scanned, _names(scanned.places, name))}")
    if problems:
        raise TargetError("\n".join(problems))
    return tuple(
        place.path for place in scanned.places if place.path in found and not is_under(place.path, found - {place.path})
    )


def refuse_tied(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise `TargetError` if a parameter at or under one of ``paths`` is shared with a module outside that path.

    Two of the ``paths`` that share a parameter are refused too: each is copied on its own, and the tie would break.
    """
    problems = []
    for path in paths:
        for names in dict.fromkeys(tied(model).values()):
            inside = [name for name in names if is_under(name, (path,))]
            if inside and len(inside) < len(names):
                outside = [name for name in names if name not in inside]
                problems.append(f"{path!r} cannot be trained in full: {inside[0]} is tied to {', '.join(outside)}")
    if problems:
        raise TargetError("\n".join(problems))


def refuse_unfit(model: nn.Module, targets: Iterable[Target]) -> None:
    """Raise `TargetError` naming every target whose weight is tied, on meta, rewritten or read past its forward."""
    scanned = survey(model)
    places = {id(place.module): place for place in scanned.places}
    obstacles = {target.path: weight_obstacle(places[id(target.module)], scanned) for target in targets}
    refused = {path: obstacle for path, obstacle in obstacles.items() if obstacle is not None}
    if refused:
        raise TargetError("\n".join(_lines(refused)))


def from_paths(model: nn.Module, paths: Iterable[str]) -> tuple[Target, ...]:
    """The modules at exactly ``paths`` (an adapter file's), in their order.

    Raises `TargetError` naming every path that the model lacks. Paths are data here: none is read as a pattern.
    """
    by_path = {path: place.module for place in survey(model).places for path in place.paths}
    wanted = tuple(paths)
    missing = [f"no module named {path!r}{closest(path, by_path)}" for path in wanted if path not in by_path]
    if missing:
        raise TargetError("\n".join(missing))
    return tuple(Target(path, by_path[path]) for path in wanted)


def _patterns(targets: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns one by one."""
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    if not patterns:
        raise TargetError('targets is empty; name modules, or say "all-linear", or leave it out for the default')
    return patterns


def _stacks(scanned: Survey, scope: _Scope) -> Iterator[str]:
    """Stacks of matrices that a module which is no layer holds itself: full parameter names.

    Position embeddings and class tokens have three dimensions too, but one of them is 1 or their name says it.
    """
    for place in scanned.places:
        if not scope.covers(place) or scope.trains(place) or scope.is_adaptable(place):
            continue
        if not isinstance(place.module, _ConvNd | ParametrizationList):
            for name, tensor in place.module._parameters.items():
                if tensor is not None and tensor.ndim >= 3 and min(tensor.shape) > 1 and "embed" not in name:
                    yield join(place.path, name)


# Choosing


def _choose_default(model: nn.Module, scanned: Survey, scope: _Scope, findings: _Findings) -> None:
    names = default_names(model)
    convolutions = () if names else default_convolutions(scanned)
    for place in filter(scope.covers, convolutions):
        _choose_broadly(place, obstacle_at(place, scanned, adaptable=scope.is_adaptable(place)), scope, findings)
    if not convolutions:
        _choose_linear(scanned, scope, findings, names=names or ("*",))


def _tell_root(model: nn.Module, findings: _Findings, *, adaptable: bool) -> None:
    """An adapter is a child of a layer inside the model: a model that is a layer itself has no place for one."""
    if adaptable:
        findings.left_out[f"the {type(model).__name__} itself"] = _ROOT


def _choose_linear(scanned: Survey, scope: _Scope, findings: _Findings, *, names: Sequence[str]) -> None:
    """The linear layers that one of the patterns ``names`` matches; never an output head."""
    matchers = tuple(map(matcher, names))
    for place in scanned.places:
        if not scope.covers(place) or scope.trains(place):
            continue
        if not any(is_under(path, scanned.heads) for path in place.paths):
            named = any(match(path) for match in matchers for path in place.paths)
            _choose_linear_place(place, named, scanned, scope, findings)
        elif isinstance(place.module, nn.MultiheadAttention):
            findings.left_out[place.path] = _HEAD
    findings.left_out.update(dict.fromkeys(scope.stacks, _STACK))


def _choose_linear_place(place: Place, named: bool, scanned: Survey, scope: _Scope, findings: _Findings) -> None:
    obstacle = obstacle_at(place, scanned, adaptable=scope.is_adaptable(place))
    if obstacle is None and named and is_linear(place.module):
        findings.found[place.path] = place
    elif obstacle is not None and may_be_linear(place) and (named or not scope.is_adaptable(place)):
        findings.left_out[place.path] = obstacle


def _choose_matching(scanned: Survey, scope: _Scope, findings: _Findings, pattern: str) -> None:
    match, broad = matcher(pattern), is_broad(pattern)
    matched = _matching(scanned.places, match)
    if not matched:
        names = _names(filter(scope.is_adaptable, scanned.places), pattern) | {ALL_LINEAR}
        findings.problems.append(_unknown(pattern, scanned, names))
        return
    obstacles = {place.path: obstacle_at(place, scanned, adaptable=scope.is_adaptable(place)) for place in matched}
    for place in filter(scope.covers, matched):
        (_choose_broadly if broad else _choose_named)(place, obstacles[place.path], scope, findings)
    findings.left_out.update((name, _STACK) for name in scope.stacks if match(name))
    if broad and all(obstacles.values()):
        reasons = {path: obstacle for path, obstacle in obstacles.items() if obstacle}
        findings.problems += [f"{pattern!r} matches nothing that can be adapted:", *_lines(reasons)]


def _choose_named(place: Place, obstacle: str | None, scope: _Scope, findings: _Findings) -> None:
    if obstacle is None and scope.trains(place):
        obstacle = "is trained in full (train_modules); exclude it from the targets, or do not train it"
    if obstacle is None:
        findings.found[place.path] = place
    else:
        findings.refused[place.path] = obstacle


def _choose_broadly(place: Place, obstacle: str | None, scope: _Scope, findings: _Findings) -> None:
    if scope.trains(place):
        return
    if obstacle is None:
        findings.found[place.path] = place
    elif any(parameter is not None for parameter in place.module._parameters.values()):
        findings.left_out[place.path] = obstacle


def _excluded(scanned: Survey, exclude: Sequence[str], findings: _Findings) -> frozenset[str]:
    """Every path at or under a match: somebody who excludes a container means what is in it."""
    matched: set[str] = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        match = matcher(pattern)
        hits = [path for place in scanned.places for path in place.paths if match(path)]
        matched.update(hits)
        if not hits:
            findings.problems.append(f"exclude: {_unknown(pattern, scanned, _names(scanned.places, pattern))}")
    return frozenset(path for place in scanned.places for path in place.paths if is_under(path, matched))


def _check_layers(scanned: Survey, scope: _Scope, findings: _Findings) -> None:
    present = sorted({layer for place in scanned.places if (layer := layer_number(place.path)) is not None})
    missing = [layer for layer in scope.layers or () if layer not in present]
    if scope.layers is not None and not scope.layers:
        findings.problems.append("layers is empty; give layer numbers, or leave it out for all layers")
    if missing:
        there = f"its layers are {present[0]} to {present[-1]}" if present else "no path of it has a number"
        findings.problems.append(f"the model has no layer {', '.join(map(str, missing))}; {there}")


# Words

_HEAD = "nn.MultiheadAttention in an output head, which is meant only if it is named"
_ROOT = "is the model, and only modules inside one can be targets; put it into a module, nn.Sequential say, to adapt it"
_STACK = "is a stack of matrices in one parameter (of experts or attention heads, say), which cannot be adapted yet"

_SHOWN = 8
_NOTHING = 'there is nothing to adapt: no module is left over (never output heads; by "all-linear" no convolutions)'


def _unknown(pattern: str, scanned: Survey, names: set[str]) -> str:
    """What to say about a pattern that matches no module; ``names`` are those it may have been meant for."""
    match = matcher(pattern)
    parameter = next((name for name in scanned.parameters if match(name)), None)
    if parameter is None:
        listed = sorted(names - {ALL_LINEAR})
        some = f"; there are: {', '.join(listed[:_SHOWN])}{', ...' if len(listed) > _SHOWN else ''}" if listed else ""
        return f"no module named {pattern!r}{closest(pattern, sorted(names)) or some}"
    kind = "a stack of matrices in one parameter" if scanned.parameters[parameter].ndim >= 3 else "a parameter"
    return f"{pattern!r} is {kind} ({parameter}), and no module; only modules can be named yet"


def _names(places: Iterable[Place], pattern: str) -> set[str]:
    """The ends of the paths: one name, two, and as many as the pattern has."""
    lengths = {1, 2, pattern.count(".") + 1}
    return {".".join(path.split(".")[-length:]) for place in places for path in place.paths for length in lengths}


def _lines(reasons: Mapping[str, str]) -> list[str]:
    """A line for each path with its reason; one line for paths that differ by their numbers alone."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, reason in reasons.items():
        shape = ".".join("*" if is_number(part) else part for part in path.split("."))
        alike[shape, reason].append(path)
    return [
        f"{first}{f' and {len(others)} more like it' if others else ''}: {reason}"
        for (_, reason), (first, *others) in alike.items()
    ]


def _matching(places: Iterable[Place], match: Matcher) -> list[Place]:
    return [place for place in places if any(map(match, place.paths))]
