"""Target selection: from a model and patterns to the places to adapt, changing nothing.

A plain name is a promise that its modules can be adapted, so anything in its way is an error. Globs, regular
expressions, ``"all-linear"`` and the defaults choose broadly: what they leave out is told by one warning.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence

import attrs
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from tunerkit.errors import TargetError, TunerkitWarning
from tunerkit.libraries import torch_private
from tunerkit.paths import is_under, join
from tunerkit.patterns import Matcher, is_broad, matcher
from tunerkit.records import Target
from tunerkit.targets.eligibility import obstacle_at
from tunerkit.targets.resolution import ALL_LINEAR, lines, matching, names_of, unknown
from tunerkit.targets.scan import Scan, ScannedModule, default_convolutions, is_linear, may_be_linear


@attrs.define(eq=False)
class _Findings:
    """What the patterns led to: paths ``found``, problems, and by reason the paths left out and those in the way."""

    found: set[str] = attrs.Factory(set)
    problems: list[str] = attrs.Factory(list)
    left_out: dict[str, str] = attrs.Factory(dict)
    refused: dict[str, str] = attrs.Factory(dict)


@attrs.frozen(eq=False)
class _Scope:
    """The part of the model the caller wants: without ``excluded``, in ``layers`` if given."""

    excluded: frozenset[str]
    layers: Collection[int] | None
    trained: Collection[str]
    stacks: Sequence[str] = ()  # names of parameters that are stacks of matrices

    def covers(self, module: ScannedModule) -> bool:
        in_layers = self.layers is None or module.layer in self.layers
        return in_layers and self.excluded.isdisjoint(module.paths)

    def trains(self, module: ScannedModule) -> bool:
        return any(is_under(path, self.trained) for path in module.paths)


def select(
    scanned: Scan,
    *,
    targets: str | Sequence[str] | None,
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    trained: Collection[str] = (),
) -> tuple[Target, ...]:
    """The targets that the patterns select, in the model's order.

    ``targets`` of None means the architecture's default; else the convolutions, where the blocks hold no linear layer
    (see `default_convolutions`); else ``"all-linear"``: every linear layer except output heads. ``exclude`` takes
    patterns too; a container it matches is excluded with all that is in it. ``layers`` keeps the targets whose path
    has one of these numbers as its first number. ``trained`` are paths of modules trained in full: no target lies at
    or under one. Raises `TargetError` naming every problem at once; warns once, naming what a broad pattern left out.
    """
    findings = _Findings()
    scope = _Scope(_excluded(scanned, exclude, findings), layers, trained)
    scope = attrs.evolve(scope, stacks=tuple(_stacks(scanned, scope)))
    patterns = None if targets is None else _patterns(targets)
    if scanned.root.base is not None and (patterns is None or ALL_LINEAR in patterns):
        # An adapter is a child of a layer inside the model: a model that is a layer itself has no place for one.
        findings.left_out[f"the {type(scanned.root.module).__name__} itself"] = _ROOT
    if patterns is None:
        _choose_default(scanned, scope, findings)
    for pattern in patterns or ():
        if pattern == ALL_LINEAR:
            _choose_linear(scanned, scope, findings, matcher("*"))
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
    return tuple(Target(each.path, each.module) for each in scanned.modules if each.path in findings.found)


def _patterns(targets: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns one by one."""
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    if not patterns:
        raise TargetError('targets is empty; name modules, or say "all-linear", or leave it out for the default')
    return patterns


def _stacks(scanned: Scan, scope: _Scope) -> Iterator[str]:
    """Stacks of matrices that a module which is no layer holds itself: full parameter names.

    Position embeddings and class tokens have three dimensions too, but one of them is 1 or their name says it.
    """
    for each in scanned.modules:
        unstacked = isinstance(each.module, ParametrizationList) or torch_private.is_convolution(each.module)
        if each.base is not None or unstacked:
            continue
        for name, tensor in torch_private.own_parameters(each.module).items():
            stacked = tensor is not None and tensor.ndim >= 3 and min(tensor.shape) > 1 and "embed" not in name
            if stacked and scope.covers(each) and not scope.trains(each):
                yield join(each.path, name)


# Choosing


def _choose_default(scanned: Scan, scope: _Scope, findings: _Findings) -> None:
    ends = tuple(f".{name}" for name in scanned.default_names)
    # A variant whose modules have other names is served by what it is made of, not refused.
    if any(f".{path}".endswith(ends) for path in scanned.by_path):
        _choose_linear(scanned, scope, findings, lambda path: f".{path}".endswith(ends))
    elif convolutions := default_convolutions(scanned):
        for each in filter(scope.covers, convolutions):
            _choose(each, obstacle_at(each, scanned), scope, findings, broad=True)
    else:
        _choose_linear(scanned, scope, findings, matcher("*"))


def _choose_linear(scanned: Scan, scope: _Scope, findings: _Findings, match: Matcher) -> None:
    """The linear layers of which one path matches; never an output head."""
    for each in scanned.modules:
        if each.in_head:
            if isinstance(each.module, nn.MultiheadAttention) and scope.covers(each) and not scope.trains(each):
                findings.left_out[each.path] = _HEAD
        # What has a base-layer kind and no such name was left out on purpose.
        elif (each.base is None or any(map(match, each.paths))) and scope.covers(each) and not scope.trains(each):
            obstacle = obstacle_at(each, scanned)
            if obstacle is None and is_linear(each.module):
                findings.found.add(each.path)
            elif obstacle is not None and may_be_linear(each.module):
                findings.left_out[each.path] = obstacle
    findings.left_out.update(dict.fromkeys(scope.stacks, _STACK))


def _choose_matching(scanned: Scan, scope: _Scope, findings: _Findings, pattern: str) -> None:
    match, broad = matcher(pattern), is_broad(pattern)
    matched = matching(scanned.modules, match)
    if not matched:
        names = names_of((each for each in scanned.modules if each.base is not None), pattern) | {ALL_LINEAR}
        findings.problems.append(unknown(pattern, scanned, names))
        return
    obstacles = {each.path: obstacle_at(each, scanned) for each in matched}
    for each in filter(scope.covers, matched):
        _choose(each, obstacles[each.path], scope, findings, broad=broad)
    findings.left_out.update((name, _STACK) for name in scope.stacks if match(name))
    if broad and all(obstacles.values()):
        reasons = {path: obstacle for path, obstacle in obstacles.items() if obstacle}
        findings.problems += [f"{pattern!r} matches nothing that can be adapted:", *lines(reasons)]


def _choose(each: ScannedModule, obstacle: str | None, scope: _Scope, findings: _Findings, *, broad: bool) -> None:
    if scope.trains(each) and (broad or obstacle is None):
        obstacle = "is trained in full (train_modules); exclude it from the targets, or do not train it"
    if obstacle is None:
        findings.found.add(each.path)
    elif not broad:
        findings.refused[each.path] = obstacle
    elif not scope.trains(each) and next(each.module.parameters(recurse=False), None) is not None:
        findings.left_out[each.path] = obstacle


def _excluded(scanned: Scan, exclude: Sequence[str], findings: _Findings) -> frozenset[str]:
    """Every path at or under a match: somebody who excludes a container means what is in it."""
    matched: set[str] = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        match = matcher(pattern)
        hits = [path for path in scanned.by_path if match(path)]
        matched.update(hits)
        if not hits:
            findings.problems.append(f"exclude: {unknown(pattern, scanned, names_of(scanned.modules, pattern))}")
    return frozenset(path for path in scanned.by_path if is_under(path, matched))


def _check_layers(scanned: Scan, scope: _Scope, findings: _Findings) -> None:
    present = sorted({each.layer for each in scanned.modules if each.layer is not None})
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
