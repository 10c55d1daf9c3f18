"""Discovery: finds the entry points of installed distributions, and reads which of them may load."""

import os
import re
from collections.abc import Iterable
from importlib import metadata

from tunerkit.errors import PluginError, closest, cut
from tunerkit.records import MethodInfo

GROUP = "tunerkit"
VARIABLE = "TUNERKIT_PLUGINS"
Source = tuple[metadata.EntryPoint, MethodInfo]
Failure = tuple[str, MethodInfo]


def discover(distributions: Iterable[metadata.Distribution]) -> tuple[list[Source], list[Failure]]:
    """Return the entry points of the group, sorted by distribution, and the distributions that cannot be read.

    If two distributions have the same name, only the first one on the path counts, as for Python's imports.
    """
    sources: dict[str, list[Source]] = {}
    failures = []
    for distribution in distributions:
        try:
            points = distribution.entry_points.select(group=GROUP)
            if not points:
                continue
            info = MethodInfo(canonical(distribution.metadata["Name"]), distribution.metadata["Version"] or "")
        except Exception as error:
            path = distribution._path if isinstance(distribution, metadata.PathDistribution) else distribution
            label = os.path.basename(str(path))
            failures.append((label, MethodInfo(label, "", f"its metadata cannot be read: {error_text(error)}")))
        else:
            sources.setdefault(info.distribution, [(point, info) for point in points])
    return [source for _, found in sorted(sources.items()) for source in found], failures


def canonical(name: str) -> str:
    """Normalise a distribution's name as the packaging standard does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_limit(installed: Iterable[str]) -> frozenset[str] | None:
    """Return the entry points that the environment variable allows; None allows all.

    Raises `PluginError` if one of them is not installed.
    """
    value = os.environ.get(VARIABLE)
    if value is None:
        return None
    wanted, known = frozenset(filter(None, map(str.strip, value.split(",")))), sorted(set(installed))
    problems = [f"no plugin named {name!r}{closest(name, known)}" for name in sorted(wanted.difference(known))]
    if problems:
        raise PluginError(
            f"{VARIABLE}={value!r}: {'; '.join(problems)}\n"
            f"installed: {', '.join(known) or 'none'} (an empty value loads none)"
        )
    return wanted


def import_plugin(point: metadata.EntryPoint) -> object:
    """Import the module that the entry point names. Exceptions of the module propagate."""
    if not point.pattern.match(point.value):
        raise PluginError(f"its entry point is not a module: {point.value!r}")
    return point.load()


def error_text(error: BaseException) -> str:
    """Format an exception in one short line. It starts with the class, except for a `PluginError`."""
    try:
        text = " ".join(str(error).split())
    except BaseException as second:  # the exception of a plugin may raise another when it is printed
        text = f"(printing its message raised {type(second).__name__})"
    return cut(text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}", 500)
