"""From exact paths and module patterns to modules, and what is wrong with those that are named."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tunerkit.errors import TargetError, closest
from tunerkit.paths import is_number, is_under
from tunerkit.patterns import Matcher, matcher
from tunerkit.records import Target
from tunerkit.targets.eligibility import weight_obstacle
from tunerkit.targets.scan import Place, Survey, survey, tied

ALL_LINEAR = "all-linear"


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
        matched = matching(scanned.places, matcher(name))
        found.update(place.path for place in matched)
        if not matched:
            problems.append(f"{what}: {unknown(name, scanned, names_of(scanned.places, name))}")
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
        raise TargetError("\n".join(lines(refused)))


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


_SHOWN = 8


def unknown(pattern: str, scanned: Survey, names: set[str]) -> str:
    """What to say about a pattern that matches no module; ``names`` are those it may have been meant for."""
    match = matcher(pattern)
    parameter = next((name for name in scanned.parameters if match(name)), None)
    if parameter is None:
        listed = sorted(names - {ALL_LINEAR})
        some = f"; there are: {', '.join(listed[:_SHOWN])}{', ...' if len(listed) > _SHOWN else ''}" if listed else ""
        return f"no module named {pattern!r}{closest(pattern, sorted(names)) or some}"
    kind = "a stack of matrices in one parameter" if scanned.parameters[parameter].ndim >= 3 else "a parameter"
    return f"{pattern!r} is {kind} ({parameter}), and no module; only modules can be named yet"


def names_of(places: Iterable[Place], pattern: str) -> set[str]:
    """The ends of the paths: one name, two, and as many as the pattern has."""
    lengths = {1, 2, pattern.count(".") + 1}
    return {".".join(path.split(".")[-length:]) for place in places for path in place.paths for length in lengths}


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


def matching(places: Iterable[Place], match: Matcher) -> list[Place]:
    """The places of which one path matches."""
    return [place for place in places if any(map(match, place.paths))]
