"""Discovery: the entry points that installed distributions offer, and what the environment lets load."""

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
    """Where a plugin comes from: the entry point's name, the distribution's canonical name, its version."""

    entry: str
    distribution: str
    version: str
    point: metadata.EntryPoint | None = None

    def info(self, error: str | None = None) -> MethodInfo:
        return MethodInfo(self.distribution, self.version, error)


@attrs.frozen(eq=False)
class Failure:
    """A plugin, or one method of it, that is not on offer."""

    name: str
    info: MethodInfo


def discover(distributions: Iterable[metadata.Distribution]) -> tuple[list[Source], list[Failure]]:
    """The entry points of the group, ordered by distribution, and the distributions that cannot be read.

    Of two distributions of one name Python imports the one that comes first on the path; the other is hidden here too.
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
    """A distribution's name as the packaging rules compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_limit(sources: Iterable[Source]) -> frozenset[str] | None:
    """The entry points that the environment allows; None allows all."""
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
    """Import the module that the entry point names; whatever that raises goes through."""
    if source.point is None or not source.point.pattern.match(source.point.value):
        raise PluginError(f"its entry point is no module: {getattr(source.point, 'value', None)!r}")
    return source.point.load()


def error_text(error: BaseException) -> str:
    """An exception in one line, its class first unless it is our own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"
