"""The loaded plugins of one process: who provides which method, which plugins failed, and why a method is missing."""

from collections.abc import Iterable
from importlib import metadata

import attrs
import pluggy

from tunerkit.errors import closest, shown
from tunerkit.hooks import specs
from tunerkit.hooks.discovery import VARIABLE, Failure, canonical, discover, error_text, import_plugin, read_limit
from tunerkit.hooks.interrupts import watch_for_interrupts
from tunerkit.hooks.validation import Plugin, admit
from tunerkit.markers import PROJECT
from tunerkit.paths import few
from tunerkit.records import MethodInfo


@attrs.define(eq=False)
class Catalog:
    """The loaded state.

    Attributes:
        manager: pluggy's manager.
        limit: The entry points that may load; None allows all.
        plugins: The plugins in load order.
        owners: The plugin that provides each method.
        failures: The plugins that could not be loaded.
        left_out: The reason why a plugin's answer to a hook is not used, by plugin and hook.
    """

    manager: pluggy.PluginManager
    limit: frozenset[str] | None
    plugins: tuple[Plugin, ...] = ()
    owners: dict[str, Plugin] = attrs.field(factory=dict)
    failures: list[Failure] = attrs.field(factory=list)
    left_out: dict[tuple[Plugin, str], str] = attrs.field(factory=dict)

    def drop(self, found: Plugin) -> None:
        """Unregister a plugin, and forget it as the owner of its methods."""
        self.manager.unregister(found.plugin)
        self.plugins = tuple(known for known in self.plugins if known is not found)
        self.owners = {name: owner for name, owner in self.owners.items() if owner is not found}
        self.left_out = {key: reason for key, reason in self.left_out.items() if key[0] is not found}

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


def load(distributions: Iterable[metadata.Distribution] | None) -> Catalog:
    """Load each plugin separately, then decide which plugin owns each method.

    Whatever a plugin raises while it is imported counts as its failure, including SystemExit and KeyboardInterrupt.
    Only the user's own Ctrl-C ends the loading.
    """
    sources, failures = discover(metadata.distributions() if distributions is None else distributions)
    limit = read_limit(point.name for point, _ in sources)
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specs)
    catalog = Catalog(manager, limit, failures=failures if limit is None else [])
    with watch_for_interrupts() as interrupted:
        for point, info in sources:
            if limit is None or point.name in limit:
                try:
                    catalog.plugins += (admit(manager, import_plugin(point), point.name, info),)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt) and interrupted():
                        raise
                    catalog.failures.append((point.name, attrs.evolve(info, error=error_text(error))))
    _settle(catalog)
    return catalog


def _settle(catalog: Catalog) -> None:
    """Give each method one owner: the distribution named after the method, else the first by name.

    A plugin whose methods all went to others is unregistered.
    """
    for name in sorted({name for found in catalog.plugins for name in found.methods}):
        namesake = canonical(f"tunerkit-{name}")
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
