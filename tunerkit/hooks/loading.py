"""Find the plugins that are installed, load each by itself, and decide which one provides each method."""

import os
import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import attrs
import pluggy

from tunerkit.errors import PluginError, closest, error_text, is_of_user, shown
from tunerkit.hooks import specs
from tunerkit.hooks.validation import HOOKS, Plugin, admit
from tunerkit.paths import few
from tunerkit.records import MethodInfo

GROUP = "tunerkit"
VARIABLE = "TUNERKIT_PLUGINS"
Source = tuple[metadata.EntryPoint, MethodInfo]
Failure = tuple[str, MethodInfo]


@attrs.define(eq=False)
class Catalog:
    """The plugins of a registry. What changes is replaced, so that other threads may read.

    Attributes:
        manager: pluggy's manager.
        limit: The entry points that may load; None allows all.
        plugins: The plugins in load order.
        owners: The plugin that provides each method.
        failures: The plugins that could not be loaded.
        left_out: The reason why a plugin's answer to a hook is not used, by plugin and hook.
        known: What these plugins have answered to hooks that ask what they know, until one comes or goes.
    """

    manager: pluggy.PluginManager
    limit: frozenset[str] | None
    plugins: tuple[Plugin, ...] = ()
    owners: dict[str, Plugin] = attrs.field(factory=dict)
    failures: list[Failure] = attrs.field(factory=list)
    left_out: dict[tuple[Plugin, str], str] = attrs.field(factory=dict)
    known: dict[object, Any] = attrs.field(factory=dict)

    def implementations(self, hook: str) -> list[pluggy.HookImpl]:
        """Return all implementations of a hook in the order of the plugins: ``tryfirst`` ones first, ``trylast`` last.

        Raises `PluginError` if there is no such hook.
        """
        if hook not in HOOKS:
            raise PluginError(f"there is no hook {hook!r}{closest(hook, HOOKS)}")
        caller: pluggy.HookCaller = vars(self.manager.hook)[hook]
        return sorted(caller.get_hookimpls(), key=lambda found: (found.trylast, not found.tryfirst))

    def add(self, found: Plugin) -> None:
        """Add a plugin that pluggy knows, with the methods that nobody else provides."""
        self.plugins = (*self.plugins, found)
        self.owners = {**dict.fromkeys(found.methods, found), **self.owners}
        self.known = {}

    def drop(self, found: Plugin) -> None:
        """Unregister a plugin, and forget it as the owner of its methods."""
        self.manager.unregister(found.plugin)
        self.plugins = tuple(known for known in self.plugins if known is not found)
        self.owners = {name: owner for name, owner in self.owners.items() if owner is not found}
        self.left_out = {key: reason for key, reason in self.left_out.items() if key[0] is not found}
        self.known = {}

    def listed(self) -> dict[str, MethodInfo]:
        """Return a record for each method by its name, and one for each failure by the name of its entry point."""
        found = {name: owner.info for name, owner in self.owners.items()}
        partial = [(key[0].entry, attrs.evolve(key[0].info, error=text)) for key, text in self.left_out.items()]
        for name, info in (*self.failures, *partial):
            while name in found:
                name = f"{name} ({info.distribution})"
            found[name] = info
        return dict(sorted(found.items()))

    def missing(self, name: object) -> str:
        """Explain why a method is missing: what is installed, close matches, failed plugins, the limit on loading."""
        installed = (
            few(sorted(self.owners), shown=20) or "none (each is a separate distribution, such as tunerkit-lora)"
        )
        parts = [f"no method named {shown(name)}; installed: {installed}{closest(str(name), self.owners)}"]
        for failed, info in self.failures:
            whose = f"{info.distribution} {info.version}".rstrip()
            parts.append(f"not loaded: {failed!r} of {whose}: {info.error}")
        if self.limit is not None:
            parts.append(f"{VARIABLE} limits loading to: {', '.join(sorted(self.limit)) or 'none'}")
        return "\n".join(parts)

    def absence(self, distribution: str) -> str | None:
        """Say why no plugin of a distribution is loaded, and what to do; None if one is."""
        if any(found.info.distribution == distribution for found in self.plugins):
            return None
        failed = next((info for _, info in self.failures if info.distribution == distribution), None)
        if failed is not None:
            return f"{distribution} cannot be used: {failed.error} (to upgrade it: pip install -U {distribution})"
        if self.limit is not None:
            return f"{distribution} is not loaded, or not installed: {VARIABLE} limits what is loaded"
        return f"{distribution} is not installed"


def load(distributions: Iterable[metadata.Distribution] | None) -> Catalog:
    """Load each plugin separately, then decide which plugin owns each method.

    Whatever a plugin raises while it is imported counts as its failure, including SystemExit. Only the user's own
    Ctrl-C ends the loading.
    """
    sources, failures = _discover(metadata.distributions() if distributions is None else distributions)
    limit = _read_limit(point.name for point, _ in sources)
    manager = pluggy.PluginManager(specs.PROJECT)
    manager.add_hookspecs(specs)
    catalog = Catalog(manager, limit, failures=failures if limit is None else [])
    for point, info in sources:
        if limit is None or point.name in limit:
            try:
                if not point.pattern.match(point.value):
                    raise PluginError(f"its entry point is not a module: {point.value!r}")
                catalog.add(admit(manager, point.load(), point.name, info))
            except BaseException as error:
                if is_of_user(error):
                    raise
                catalog.failures.append((point.name, attrs.evolve(info, error=error_text(error))))
    _settle(catalog)
    return catalog


def _discover(distributions: Iterable[metadata.Distribution]) -> tuple[list[Source], list[Failure]]:
    """Return the entry points of the group, sorted by distribution, and the distributions that cannot be read.

    If two distributions have the same name, only the first one on the path counts, as for Python's imports. Another
    version is listed as a failure.
    """
    sources: dict[str, list[Source]] = {}
    failures = []
    for distribution in distributions:
        try:
            points = distribution.entry_points.select(group=GROUP)
            if not points:
                continue
            info = MethodInfo(_canonical(distribution.metadata["Name"]), distribution.metadata["Version"] or "")
        except Exception as error:
            path = distribution._path if isinstance(distribution, metadata.PathDistribution) else distribution
            label = os.path.basename(str(path))
            failures.append((label, MethodInfo(label, "", f"its metadata cannot be read: {error_text(error)}")))
        else:
            used = sources.setdefault(info.distribution, [(point, info) for point in points])[0][1]
            if used.version != info.version:
                why = (
                    f"it is installed twice, and version {used.version} comes first on the path; uninstall one of them"
                )
                failures.append((f"{info.distribution} {info.version}", attrs.evolve(info, error=why)))
    return [source for _, found in sorted(sources.items()) for source in found], failures


def _canonical(name: str) -> str:
    """Normalise a distribution's name as the packaging standard does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _read_limit(installed: Iterable[str]) -> frozenset[str] | None:
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


def _settle(catalog: Catalog) -> None:
    """Give each method one owner: the distribution named after the method, else the first by name.

    A plugin whose methods all went to others is unregistered.
    """
    for name in sorted({name for found in catalog.plugins for name in found.methods}):
        namesake = _canonical(f"tunerkit-{name}")
        claims = [found for found in catalog.plugins if name in found.methods]
        owner, *others = sorted(claims, key=lambda found: found.info.distribution != namesake)
        catalog.owners[name] = owner
        for loser in (other.info for other in others):
            why = (
                f"method {name!r} is also provided by {owner.info.distribution}, which is used; "
                f"{loser.distribution}'s is left out"
            )
            catalog.failures.append((f"{name} ({loser.distribution})", attrs.evolve(loser, error=why)))
    for found in catalog.plugins:
        if found.methods and found not in catalog.owners.values():
            catalog.drop(found)
