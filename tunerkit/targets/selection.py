"""Target selection: choose the modules to adapt from a scan and patterns, without changing the model.

If a module that matches a plain name cannot be adapted, that is an error. Globs, regular expressions, ``"all-linear"``
and the defaults leave such modules out, with one warning that lists them.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

import attrs
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from tunerkit.errors import TargetError, closest, shown, warn
from tunerkit.extras import install
from tunerkit.layers import torch_private, whole_shape
from tunerkit.paths import few, is_under, join
from tunerkit.patterns import Matcher, is_broad, is_exact, matcher
from tunerkit.records import Method, Target
from tunerkit.targets.eligibility import is_norm, lines, obstacle_at, refuse
from tunerkit.targets.scan import SEARCHED, Scan, ScannedModule

ALL_LINEAR: Final = "all-linear"
_HEAD = "nn.MultiheadAttention in an output head, which is adapted only by a plain name"
_ROOT = "is the model itself, and only modules inside the model can be targets; put it into an nn.Sequential first"
_STACK = f"is a stack of matrices in one parameter that no plugin describes; for experts, {install('experts')}"
_STACK += "; other classes need a plugin that describes them, and a forward that no library has replaced"
_TRAINED = "is trained in full (train_modules); exclude it from the targets, or remove it from train_modules"
_NOTHING = 'there is nothing to adapt: no module is left (never output heads; never convolutions with "all-linear")'


@attrs.frozen(eq=False)
class _Scope:
    """The modules that patterns may choose from."""

    scanned: Scan
    free: Sequence[ScannedModule]  # possible targets
    trained: Sequence[ScannedModule]  # modules trained in full
    stacks: Sequence[str]  # full names of parameters with a stack of matrices
    method: Method  # the method that adapts them
    named: Collection[str] = ()  # paths in `free` that plain names match: only these may have tied weights

    def obstacle_at(self, each: ScannedModule) -> str | None:
        """Return why the module cannot be a target; None if it can."""
        return obstacle_at(each, self.scanned, self.named, method=self.method)


def select(
    scanned: Scan,
    *,
    targets: str | Sequence[str] | None,
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    trained: Collection[str] = (),
    new: Collection[str] = (),
    method: Method,
) -> tuple[Target, ...]:
    """Select the targets, in the model's order. One warning lists the modules that broad patterns leave out.

    Modules at or under a path in ``trained``, which the user trains in full, are no targets. Patterns do not match
    paths in ``new``, which are trained in full because they are new, nor torch's parametrizations, which are parts of
    other weights. Raises `TargetError`, with every problem, if nothing is selected or a named module is refused.
    """
    problems: list[str] = []
    left_alone = {*new, *(each.path for each in scanned.modules if isinstance(each.module, ParametrizationList))}
    for excluded in exclude:
        hits = matching(scanned.modules, matcher(excluded))
        left_alone.update(path for each in hits for path in each.paths)
        if not hits:
            problems.append(f"exclude: {unknown(excluded, scanned, scanned.modules, told=len(problems))}")
    free: list[ScannedModule] = []
    full: list[ScannedModule] = []
    for each in scanned.modules:
        if not any(is_under(path, left_alone) for path in each.paths) and (layers is None or each.layer in layers):
            (full if any(is_under(path, trained) for path in each.paths) else free).append(each)
    patterns: Sequence[str | None] = (targets,) if targets is None or isinstance(targets, str) else targets
    if not patterns:
        raise TargetError('targets is empty; name modules, use "all-linear", or leave it out for the default')
    plain = [matcher(name) for name in patterns if name is not None and _insists(name)]
    named = {each.path for match in plain for each in matching(free, match)} if scanned.sharers else ()
    stacks = list(_stacks(scanned, free)) if method.targets == "weights" else []
    scope = _Scope(scanned, free, full, stacks, method, named)
    found, refused, passed_over = set[str](), dict[str, str](), dict[str, str]()
    if scanned.root.base is not None and not {None, ALL_LINEAR}.isdisjoint(patterns):
        # If the model itself is a layer, it cannot be a target.
        passed_over[f"the {type(scanned.root.module).__name__} itself"] = _ROOT
    for pattern in patterns:
        chosen = dict(_choose(scope, pattern, problems))
        for path, obstacle in chosen.items():
            at = scanned.by_path.get(path)  # None for a parameter
            is_extra = at is None or (at.base is not None and at.base.stack and None in chosen.values())
            if obstacle is None:
                found.add(path)
            elif _insists(pattern) and not is_extra:  # a name of layers that stacks have too
                refused[path] = obstacle
            else:
                passed_over[path] = obstacle
    problems += [*_layer_problems(scanned, layers), *lines(refused)]
    left_out = lines(passed_over)
    refuse(problems or ([] if found else [_NOTHING, *left_out]))
    if left_out:
        warn("\n  ".join(["left out, neither adapted nor trained:", *left_out]))
    return tuple(Target(each.path, each.module) for each in scanned.modules if each.path in found)


def _insists(pattern: str | None) -> bool:
    """Whether it is an error if a matching module cannot be adapted: for plain names and patterns of a single path."""
    return pattern not in (None, ALL_LINEAR) and (not is_broad(pattern) or is_exact(pattern))


def _stacks(scanned: Scan, modules: Iterable[ScannedModule]) -> Iterator[str]:
    """Yield the full names of parameters that are stacks of matrices and not the weight of a base layer."""
    held = {(each.base.holder, each.base.weight_name) for each in scanned.modules if each.base is not None}
    for each in modules:
        if each.base is None and not torch_private.is_convolution(each.module):
            for name, tensor in torch_private.parameters_of(each.module).items():
                shape = whole_shape(tensor)
                is_stack = len(shape) >= 3 and min(shape) > 1 and (each.module, name) not in held
                if is_stack and "embed" not in name:  # not class tokens or positions
                    yield join(each.path, name)


def _layer_problems(scanned: Scan, layers: Sequence[int] | None) -> Iterator[str]:
    present = sorted({each.layer for each in scanned.modules if each.layer is not None})
    if layers is not None and not layers:
        yield "layers is empty; give layer numbers, or leave it out for all layers"
    if missing := list(map(str, sorted(set(layers or ()).difference(present)))):
        there = f"its layers are {present[0]} to {present[-1]}" if present else "its paths contain no numbers"
        yield f"the model has no layer {few(missing, shown=20)}; {there}"


# --- The modules that a pattern chooses: (path, obstacle or None) -----------------------------------------------------

_Choices = Iterator[tuple[str, str | None]]


def _choose(scope: _Scope, pattern: str | None, problems: list[str]) -> _Choices:
    """Yield (path, obstacle or None) for each module that a pattern chooses; add to ``problems`` if it matches none."""
    if pattern is None:
        return _choose_default(scope)
    return _choose_linear(scope) if pattern == ALL_LINEAR else _choose_matching(scope, pattern, problems)


def _choose_default(scope: _Scope) -> _Choices:
    """Choose the architecture's default targets; else convolutions if blocks have no linear layers; else all linear."""
    if scope.method.targets == "norms":
        return _choose_broadly(scope, (each for each in scope.free if not each.in_head and is_norm(each)))
    names: tuple[str, ...] = ()
    match scope.scanned.root.module:
        case nn.Module(config=object(model_type=str(kind))):
            known = scope.scanned.knowledge.default_targets
            names = next((each.names for each in known if kind in each.model_types), ())
    ends = tuple(f".{name}" for name in names)
    # A variant of the architecture may use other names: choose by layer type then, without an error.
    if any(f".{each.path}".endswith(ends) for each in scope.scanned.modules):
        return _choose_linear(scope, lambda path: f".{path}".endswith(ends))
    convolutions = _default_convolutions(scope.scanned)
    return _choose_broadly(scope, convolutions) if convolutions else _choose_linear(scope)


def _choose_linear(scope: _Scope, match: Matcher = lambda path: True) -> _Choices:
    """Choose the linear layers with a matching path, outside output heads."""
    for each in scope.free:
        if each.in_head:
            if isinstance(each.module, nn.MultiheadAttention):
                yield each.path, _HEAD
        # A base layer that does not match is left out on purpose, without a warning.
        elif each.base is None or any(map(match, each.paths)):
            obstacle = scope.obstacle_at(each)
            if _is_linear(each) if obstacle is None else _may_be_linear(each):
                yield each.path, obstacle
    yield from ((name, _STACK) for name in scope.stacks)


def _choose_matching(scope: _Scope, pattern: str, problems: list[str]) -> _Choices:
    match = matcher(pattern)
    # A name of experts means the stacks that they hold.
    stacks = [(each, each.base.holder) for each in scope.scanned.modules if each.base is not None and each.base.stack]
    found = matching(scope.scanned.modules, match)
    matched = [own for each in found for own in ([s for s, holder in stacks if holder is each.module] or [each])]
    if not matched:
        candidates = (m for m in scope.scanned.modules if scope.method.targets != "weights" or m.base is not None)
        problems.append(unknown(pattern, scope.scanned, candidates, told=len(problems), others=[ALL_LINEAR]))
        return
    obstacles = {each.path: scope.obstacle_at(each) for each in matched}
    if _insists(pattern):
        for modules, otherwise in ((scope.free, None), (scope.trained, _TRAINED)):
            named = (each.path for each in modules if each.path in obstacles)
            yield from ((path, obstacles[path] or otherwise) for path in named)
    else:
        if None not in obstacles.values():
            problems += [f"{pattern!r} matches nothing that can be adapted:", *lines(obstacles)]
        yield from _choose_broadly(scope, matched)
    yield from ((name, _STACK) for name in scope.stacks if match(name))


def _choose_broadly(scope: _Scope, modules: Iterable[ScannedModule]) -> _Choices:
    """Yield (path, None) for the modules that can be adapted, and (path, obstacle) for others with parameters."""
    chosen = set(modules)
    for each in scope.free:
        if each in chosen:
            obstacle = scope.obstacle_at(each)
            if obstacle is None or torch_private.parameters_of(each.module):
                yield each.path, obstacle


def _is_linear(each: ScannedModule) -> bool:
    """Whether ``"all-linear"`` includes a module: linear layers, attention, any with in_features and out_features."""
    match each.module:
        case nn.MultiheadAttention() | nn.Module(in_features=int(), out_features=int()):
            return True
    return each.base is not None and each.base.linear


def _may_be_linear(each: ScannedModule) -> bool:
    """Whether a user may expect ``"all-linear"`` to include the module, such as a router with its own matrix."""
    module = each.module
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm) or torch_private.is_convolution(module):
        return False
    weight = torch_private.parameters_of(module).get("weight")
    return (weight is not None and len(whole_shape(weight)) == 2) or _is_linear(each)


def _default_convolutions(scanned: Scan) -> tuple[ScannedModule, ...]:
    """Return the convolutions in numbered blocks, or else in the whole body; none if linear layers are there too.

    Depthwise convolutions are left out: their matrix is as narrow as a kernel, so a low rank saves nothing.
    """

    def is_wide(module: nn.Module) -> bool:
        return torch_private.is_convolution(module) and (module.groups == 1 or module.groups < module.in_channels)

    body = [each for each in scanned.modules if not each.in_head]
    for part in ([each for each in body if each.layer is not None], body):
        if found := tuple(each for each in part if is_wide(each.module)):
            return () if any(map(_is_linear, part)) else found
    return ()


# --- Modules by pattern, for targets and for modules trained in full --------------------------------------------------


def matching(modules: Iterable[ScannedModule], match: Matcher) -> list[ScannedModule]:
    """Return the modules with at least one matching path."""
    return [module for module in modules if any(map(match, module.names))]


def unknown(
    pattern: str, scanned: Scan, candidates: Iterable[ScannedModule], *, told: int, others: Iterable[str] = ()
) -> str:
    """Return the message for a pattern that matches no module, with the closest name of ``candidates`` or ``others``.

    The search is slow, so only the first messages have a closest name; ``told`` is the number of earlier messages.
    """
    if told >= SEARCHED:
        return f"no module named {shown(pattern)}"
    for path, found in scanned.by_path.items():
        for name, parameter in torch_private.parameters_of(found.module).items():
            if matcher(pattern)(join(path, name)):
                what = "a stack of matrices in one parameter" if parameter.ndim >= 3 else "a parameter"
                holder = f"of {path!r}, a {type(found.module).__name__}" if path else "of the model itself"
                instead = f": name {path!r} to adapt its {name}" if path and found.base is not None else ""
                return f"{shown(pattern)} is {what} {holder}, and only modules can be named yet{instead}"
    # The ends of paths with one part, two parts, and as many parts as the pattern has.
    lengths = {1, 2, pattern.count(".") + 1}
    parts = [path.split(".") for module in candidates for path in module.paths]
    names = {".".join(each[-length:]) for each in parts for length in lengths}
    some = f"; there are: {few(sorted(names), shown=SEARCHED)}" if names else ""
    regular = "; a regular expression begins with 're:'" if ".*" in pattern and not pattern.startswith("re:") else ""
    return f"no module named {shown(pattern)}{closest(pattern, sorted({*names, *others})) or some}{regular}"
