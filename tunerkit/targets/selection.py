"""Target selection: from a model and patterns to the places to adapt, changing nothing.

A plain name is a promise that its modules can be adapted, so anything in its way is an error. Globs, regular
expressions, ``"all-linear"`` and the defaults choose broadly: what they leave out is told by one warning.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence

import attrs
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from tunerkit.errors import TargetError, TunerkitWarning
from tunerkit.libraries import default_names, torch_private
from tunerkit.paths import is_under, join, layer_number
from tunerkit.patterns import is_broad, matcher
from tunerkit.records import Target
from tunerkit.targets.eligibility import obstacle_at
from tunerkit.targets.resolution import ALL_LINEAR, lines, matching, names_of, unknown
from tunerkit.targets.scan import Place, Survey, default_convolutions, is_linear, may_be_linear, survey


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
    problems = [*findings.problems, *lines(findings.refused)]
    if not problems and not findings.found:
        problems = [_NOTHING, *lines(findings.left_out)]
    if problems:
        raise TargetError("\n".join(problems))
    if findings.left_out:
        told = "\n  ".join(lines(findings.left_out))
        warnings.warn(f"left out, neither adapted nor trained:\n  {told}", TunerkitWarning, stacklevel=3)
    return tuple(Target(place.path, place.module) for place in scanned.places if place.path in findings.found)


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
        if not (torch_private.is_convolution(place.module) or isinstance(place.module, ParametrizationList)):
            for name, tensor in torch_private.own_parameters(place.module).items():
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
    matched = matching(scanned.places, match)
    if not matched:
        names = names_of(filter(scope.is_adaptable, scanned.places), pattern) | {ALL_LINEAR}
        findings.problems.append(unknown(pattern, scanned, names))
        return
    obstacles = {place.path: obstacle_at(place, scanned, adaptable=scope.is_adaptable(place)) for place in matched}
    for place in filter(scope.covers, matched):
        (_choose_broadly if broad else _choose_named)(place, obstacles[place.path], scope, findings)
    findings.left_out.update((name, _STACK) for name in scope.stacks if match(name))
    if broad and all(obstacles.values()):
        reasons = {path: obstacle for path, obstacle in obstacles.items() if obstacle}
        findings.problems += [f"{pattern!r} matches nothing that can be adapted:", *lines(reasons)]


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
    elif next(place.module.parameters(recurse=False), None) is not None:
        findings.left_out[place.path] = obstacle


def _excluded(scanned: Survey, exclude: Sequence[str], findings: _Findings) -> frozenset[str]:
    """Every path at or under a match: somebody who excludes a container means what is in it."""
    matched: set[str] = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        match = matcher(pattern)
        hits = [path for place in scanned.places for path in place.paths if match(path)]
        matched.update(hits)
        if not hits:
            findings.problems.append(f"exclude: {unknown(pattern, scanned, names_of(scanned.places, pattern))}")
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
_NOTHING = 'there is nothing to adapt: no module is left over (never output heads; by "all-linear" no convolutions)'
