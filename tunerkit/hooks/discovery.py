"""Discovery: finds the entry points of installed distributions, and reads which of them may load."""

import os
import re
from collections.abc import Iterable
from importlib import metadata

import attrs

from tunerkit.errors import PluginError, closest
from tunerkit.records import MethodInfo

GROUP = "tunerkit"
VARIABLE = "TUNERKIT_PLUGINS"


@attrs.frozen(eq=False)
class Source:
    """The origin of a plugin: the entry point's name, and the distribution's canonical name and version."""

    entry: str
    distribution: str
    version: str
    point: metadata.EntryPoint | None = None

    def info(self, error: str | None = None) -> MethodInfo:
        return MethodInfo(self.distribution, self.version, error)


@attrs.frozen(eq=False)
class Failure:
    """A plugin, or one of its methods, that cannot be used."""

    name: str
    info: MethodInfo


def discover(distributions: Iterable[metadata.Distribution]) -> tuple[list[Source], list[Failure]]:
    """Return the entry points of the group, sorted by distribution, and the distributions that cannot be read.

    If two distributions have the same name, only the first one on the path counts, as for Python's imports.
    """
    sources: dict[str, list[Source]] = {}
    failures = []
    for distribution in distributions:
        label = os.path.basename(str(getattr(distribution, "_path", distribution)))
        try:
            points = distribution.entry_points.select(group=GROUP)
            if not points:
                continue
            label, version = canonical(distribution.metadata["Name"]), distribution.metadata["Version"] or ""
            sources.setdefault(label, [Source(point.name, label, version, point) for point in points])
        except Exception as error:
            failures.append(Failure(label, MethodInfo(label, "", f"its metadata cannot be read: {error_text(error)}")))
    return [source for _, found in sorted(sources.items()) for source in found], failures


def canonical(name: str) -> str:
    """Normalise a distribution's name as the packaging standard does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_limit(sources: Iterable[Source]) -> frozenset[str] | None:
    """Return the entry points that the environment variable allows; None allows all."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return None
    wanted = frozenset(filter(None, map(str.strip, value.split(","))))
    installed = sorted({source.entry for source in sources})
    problems = [f"no plugin named {name!r}{closest(name, installed)}" for name in sorted(wanted - set(installed))]
    if problems:
        listed = ", ".join(installed) or "none"
        raise PluginError(
            f"{VARIABLE}={value!r}: {'; '.join(problems)}\ninstalled: {listed} (an empty value loads none)"
        )
    return wanted


def import_plugin(source: Source) -> object:
    """Import the module that the entry point names. Exceptions of the module propagate."""
    if source.point is None or not source.point.pattern.match(source.point.value):
        raise PluginError(f"its entry point is not a module: {getattr(source.point, 'value', None)!r}")
    return source.point.load()


def error_text(error: BaseException) -> str:
    """Format an exception in one line. It starts with the class, except for a `PluginError`."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"
