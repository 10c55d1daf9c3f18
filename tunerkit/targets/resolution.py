"""From exact paths and patterns to modules, with an error that lists every problem."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product, zip_longest

from tunerkit.errors import PluginError, TargetError, closest, shown
from tunerkit.layers import BaseLayer
from tunerkit.libraries import is_dtype_name, torch_private
from tunerkit.paths import few, is_number, is_under, join, parent
from tunerkit.patterns import Matcher, matcher
from tunerkit.records import Target
from tunerkit.targets.eligibility import obstacle_at, output_obstacle
from tunerkit.targets.scan import Scan, ScannedModule
from tunerkit.targets.ties import left_out, way_out

ALL_LINEAR = "all-linear"
_SHOWN, _LISTED = 8, 50


def resolve_modules(scanned: Scan, names: Sequence[str], *, what: str) -> tuple[str, ...]:
    """Find the modules that match patterns.

    Args:
        scanned: The scan of the model.
        names: The patterns.
        what: The setting that lists them, such as ``"train_modules"``; errors name it.

    Returns:
        The paths in the model's order; of nested modules only the outermost.

    Raises:
        TargetError: Patterns match nothing; the error lists all of them.
    """
    matched = {name: matching(scanned.modules, matcher(name)) for name in names}
    idle = [name for name, modules in matched.items() if not modules]
    refuse(f"{what}: {unknown(name, scanned, scanned.modules, told=told)}" for told, name in enumerate(idle))
    found = {module.path for modules in matched.values() for module in modules}
    paths = (module.path for module in scanned.modules if module.path in found)
    return tuple(path for path in paths if not is_under(parent(path), found))


def refuse_tied(scanned: Scan, paths: Collection[str]) -> None:
    """Raise `TargetError` if a parameter at or under one of ``paths`` is shared with a module at none of them.

    Modules at several of the ``paths`` may share one: each is trained on its own, from the same values.
    """
    problems = []
    for path, names in product(paths, dict.fromkeys(scanned.sharers.values())):
        inside = [name for name in names if is_under(name, (path,))]
        if inside and left_out(names, paths):
            outside = ", ".join(name for name in names if name not in inside)
            way = way_out(scanned, inside[0], names, setting="train_modules")
            problems.append(f"{path!r} cannot be trained in full: {inside[0]} is tied to {outside}. {way}")
    refuse(problems)


def refuse_unfit(scanned: Scan, targets: Iterable[Target], *, outputs: bool = False) -> None:
    """Raise `TargetError` listing every target that cannot be adapted: its weight, or its output for ``outputs``.

    Targets may share a weight if all modules that share it are among them: each gets its own adapter.
    """
    found = {target.path: scanned.by_path[target.path] for target in targets}
    paths = {each.path for each in found.values()}
    obstacles = {
        path: output_obstacle(each) if outputs else obstacle_at(each, scanned, paths) for path, each in found.items()
    }
    refuse(lines({path: obstacle for path, obstacle in obstacles.items() if obstacle is not None}))


def refuse_impassable(scanned: Scan) -> None:
    """Raise `TargetError` listing the packed layers, targets or not, through which no gradient would reach adapters.

    Raises:
        PluginError: The kind of one names its packing as torch's dtypes are named.
    """
    bases = {each.path: each.base for each in (scanned.root, *scanned.modules) if each.base is not None}
    packed = {path: base for path, base in bases.items() if base.packing is not None}
    obstacles = {path: base.obstacle() for path, base in packed.items()}
    refuse(lines({path or "the model": reason for path, reason in obstacles.items() if reason is not None}))
    for base in packed.values():
        _refuse_name(base)


def _refuse_name(base: BaseLayer) -> None:
    if base.packing is not None and is_dtype_name(base.packing.name):
        raise PluginError(
            f"{type(base).__name__} names its packing {base.packing.name!r}, as torch's dtype is named: files would "
            "take the packed weight for a plain one. Its plugin must put the library's name first, as in "
            f"{f'mylib {base.packing.name}'!r}"
        )


def refuse(problems: Iterable[str]) -> None:
    """Raise `TargetError` with one line per problem, if there are any."""
    if text := "\n".join(problems):
        raise TargetError(text)


def from_paths(scanned: Scan, paths: Sequence[str]) -> tuple[Target, ...]:
    """Find the modules at exact paths, such as an adapter file's. No path is read as a pattern.

    Args:
        scanned: The scan of the model.
        paths: The paths.

    Returns:
        The modules in the order of ``paths``.

    Raises:
        TargetError: Paths are missing. The error lists the first ones with the closest names, and counts the rest.
    """
    missing = [path for path in paths if not path or path not in scanned.by_path]
    # Searching for the closest names is slow, and a model of another architecture lacks every path.
    hints = [closest(path, scanned.by_path) for path in missing[:_SHOWN]]
    named = zip_longest(missing[:_LISTED], hints, fillvalue="")
    problems = [f"no module named {shown(path)}{hint}" for path, hint in named]
    more = [f"and {len(missing) - _LISTED} more modules that it lacks"] if len(missing) > _LISTED else []
    refuse([*problems, *more])
    return tuple(Target(path, scanned.by_path[path].module) for path in paths)


def unknown(
    pattern: str, scanned: Scan, candidates: Iterable[ScannedModule], *, told: int, others: Iterable[str] = ()
) -> str:
    """The error text for a pattern that matches no module.

    Its hint is the closest name of ``candidates`` or ``others``. Finding it is slow, so only the first errors have one;
    ``told`` is the number of those before.
    """
    if told >= _SHOWN:
        return f"no module named {shown(pattern)}"
    names = names_of(candidates, pattern) | set(others)
    match = matcher(pattern)
    held = ((path, torch_private.own_parameters(found.module)) for path, found in scanned.by_path.items())
    own = ((join(path, name), p) for path, parameters in held for name, p in parameters.items() if p is not None)
    name, parameter = next(((name, p) for name, p in own if match(name)), ("", None))
    if parameter is None:
        listed = sorted(names - {ALL_LINEAR})
        some = f"; there are: {few(listed, shown=_SHOWN)}" if listed else ""
        return f"no module named {shown(pattern)}{closest(pattern, sorted(names)) or some}"
    what = "a stack of matrices in one parameter" if parameter.ndim >= 3 else "a parameter"
    return f"{shown(pattern)} is {what} ({name}), and no module; only modules can be named yet"


def names_of(modules: Iterable[ScannedModule], pattern: str) -> set[str]:
    """The ends of the modules' paths with one name, with two, and with as many as ``pattern`` has."""
    lengths = {1, 2, pattern.count(".") + 1}
    return {".".join(path.split(".")[-length:]) for module in modules for path in module.paths for length in lengths}


def lines(reasons: Mapping[str, str]) -> list[str]:
    """One line for each path and its reason; paths that differ only by their numbers share a line."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, reason in reasons.items():
        shape = ".".join("*" if is_number(part) else part for part in path.split("."))
        alike[shape, reason].append(path)
    return [
        f"{first}{f' and {len(others)} more like it' if others else ''}: {reason}"
        for (_, reason), (first, *others) in alike.items()
    ]


def matching(modules: Iterable[ScannedModule], match: Matcher) -> list[ScannedModule]:
    """The modules of which at least one path matches."""
    return [module for module in modules if any(map(match, module.paths))]
