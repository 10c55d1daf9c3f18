"""From exact paths and module patterns to modules, and what is wrong with those that are named."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tunerkit.errors import TargetError, closest
from tunerkit.libraries import torch_private
from tunerkit.paths import is_number, is_under, join, parent
from tunerkit.patterns import Matcher, matcher
from tunerkit.records import Target
from tunerkit.targets.eligibility import weight_obstacle
from tunerkit.targets.scan import Scan, ScannedModule

ALL_LINEAR = "all-linear"


def resolve_modules(scanned: Scan, names: Sequence[str], *, what: str) -> tuple[str, ...]:
    """The paths of the modules that the patterns ``names`` match, in the model's order and the outermost only.

    ``what`` says in errors where the names come from (``"train_modules"``). Raises `TargetError` naming every
    pattern that matches nothing.
    """
    found: set[str] = set()
    problems = []
    for name in [names] if isinstance(names, str) else names:
        matched = matching(scanned.modules, matcher(name))
        found.update(module.path for module in matched)
        if not matched:
            problems.append(f"{what}: {unknown(name, scanned, names_of(scanned.modules, name))}")
    if problems:
        raise TargetError("\n".join(problems))
    paths = (module.path for module in scanned.modules if module.path in found)
    return tuple(path for path in paths if not is_under(parent(path), found))


def refuse_tied(scanned: Scan, paths: Iterable[str]) -> None:
    """Raise `TargetError` if a parameter at or under one of ``paths`` is shared with a module outside that path.

    Two of the ``paths`` that share a parameter are refused too: each is copied on its own, and the tie would break.
    """
    problems = []
    shared = tuple(dict.fromkeys(scanned.sharers.values()))
    for path in paths:
        for names in shared:
            inside = [name for name in names if is_under(name, (path,))]
            if inside and len(inside) < len(names):
                outside = [name for name in names if name not in inside]
                problems.append(f"{path!r} cannot be trained in full: {inside[0]} is tied to {', '.join(outside)}")
    if problems:
        raise TargetError("\n".join(problems))


def refuse_unfit(scanned: Scan, targets: Iterable[Target]) -> None:
    """Raise `TargetError` naming every target whose weight is tied, on meta, rewritten or read past its forward."""
    obstacles = {target.path: weight_obstacle(scanned.by_path[target.path], scanned) for target in targets}
    refused = {path: obstacle for path, obstacle in obstacles.items() if obstacle is not None}
    if refused:
        raise TargetError("\n".join(lines(refused)))


_SHOWN = 8


def from_paths(scanned: Scan, paths: Sequence[str]) -> tuple[Target, ...]:
    """The modules at exactly ``paths`` (an adapter file's), in their order. No path is read as a pattern.

    Raises `TargetError` naming the first paths that the model lacks, each with the closest names, and how many more.
    """
    missing = [path for path in paths if not path or path not in scanned.by_path]
    if missing:
        # To look for the closest name takes a while, and another architecture lacks them all.
        problems = [f"no module named {path!r}{closest(path, scanned.by_path)}" for path in missing[:_SHOWN]]
        more = [f"and {len(missing) - _SHOWN} more modules that it lacks"] if len(missing) > _SHOWN else []
        raise TargetError("\n".join([*problems, *more]))
    return tuple(Target(path, scanned.by_path[path].module) for path in paths)


def unknown(pattern: str, scanned: Scan, names: set[str]) -> str:
    """What to say about a pattern that matches no module; ``names`` are those it may have been meant for."""
    match = matcher(pattern)
    own = (
        (join(path, name), p)
        for path, at in scanned.by_path.items()
        for name, p in torch_private.own_parameters(at.module).items()
    )
    name, parameter = next(((name, p) for name, p in own if p is not None and match(name)), ("", None))
    if parameter is None:
        listed = sorted(names - {ALL_LINEAR})
        some = f"; there are: {', '.join(listed[:_SHOWN])}{', ...' if len(listed) > _SHOWN else ''}" if listed else ""
        return f"no module named {pattern!r}{closest(pattern, sorted(names)) or some}"
    what = "a stack of matrices in one parameter" if parameter.ndim >= 3 else "a parameter"
    return f"{pattern!r} is {what} ({name}), and no module; only modules can be named yet"


def names_of(modules: Iterable[ScannedModule], pattern: str) -> set[str]:
    """The ends of the paths: one name, two, and as many as the pattern has."""
    lengths = {1, 2, pattern.count(".") + 1}
    return {".".join(path.split(".")[-length:]) for module in modules for path in module.paths for length in lengths}


def lines(reasons: Mapping[str, str]) -> list[str]:
    """A line for each path with its reason; one line for paths that differ by their numbers alone."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, reason in reasons.items():
        shape = ".".join("*" if is_number(part) else part for part in path.split("."))
        alike[shape, reason].append(path)
    return [
        f"{first}{f' and {len(others)} more like it' if others else ''}: {reason}"
        for (_, reason), (first, *others) in alike.items()
    ]


def matching(modules: Iterable[ScannedModule], match: Matcher) -> list[ScannedModule]:
    """The modules of which one path matches."""
    return [module for module in modules if any(map(match, module.paths))]
