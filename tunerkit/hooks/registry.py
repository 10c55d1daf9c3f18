"""The registry of plugins: installed methods, and calls of one plugin or of all plugins."""

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any, NoReturn, ParamSpec

import attrs
import pluggy

from tunerkit import extras
from tunerkit.errors import PluginError, UnknownMethodError, error_text, shown, warn
from tunerkit.hooks.loading import IN_PROCESS, Asking, Catalog, Isolated, Plugin, admit, load, manager_of
from tunerkit.records import Method, MethodInfo

P = ParamSpec("P")


class Registry:
    """The plugins of one process, loaded at first use.

    ``distributions`` are searched for entry points of the group ``tunerkit``; None means all that are installed at
    that time. ``catalog`` is None until they are loaded. Every change replaces the catalog, so that readers need no
    lock: a thread that is interrupted while it has a lock would block all others.
    """

    def __init__(self, distributions: Iterable[metadata.Distribution] | None = None) -> None:
        self._distributions = None if distributions is None else tuple(distributions)
        self._lock = threading.RLock()
        self._loading = False
        self.catalog: Catalog | None = None

    def named(self, name: str) -> str:
        """Return a method's name as its plugin spells it, for a name in any case. Raises `UnknownMethodError`."""
        owners = self.loaded().owners
        alike = [own for own in owners if own.casefold() == str(name).casefold()]
        return alike[0] if name not in tuple(owners) and len(alike) == 1 else self.get(name).name

    def get(self, name: str) -> Method:
        """Return the method with this name. Raises `UnknownMethodError`, which lists similar names and failures."""
        return self._owner(name).methods[name]

    def methods(self) -> dict[str, MethodInfo]:
        """List the installed methods and the plugins that failed to load.

        Returns:
            A record for each method, by its name. A plugin that failed to load is listed with its error, by its entry
            point's name; likewise a plugin with working methods whose other parts, such as base layers, were rejected.
            If two distributions provide the same method, the rejected one is ``"name (distribution)"``.

        Raises:
            PluginError: ``TUNERKIT_PLUGINS`` names a plugin that is not installed.
        """
        return self.loaded().listed()

    def warn_of_rivals(self, method: str) -> None:
        """Warn of each distribution whose ``method`` is not used because another distribution provides it too."""
        for name, info in self.loaded().failures:
            if name == f"{method} ({info.distribution})":
                warn(str(info.error))

    def owner_of(self, method: str) -> MethodInfo:
        """Return the distribution and version that provide ``method``. Raises `UnknownMethodError`."""
        return self._owner(method).info

    def plugin_of(self, method: str) -> str:
        """Describe the plugin that owns ``method``, for an error."""
        return f"the plugin of method {method!r} ({self.owner_of(method).distribution})"

    def lacking(self, what: str, extra: str | None = None) -> str | None:
        """Return a message that the extra that does ``what`` ("compares them") is missing; None if it is loaded."""
        extra = extra or extras.DOES[what]
        distribution = extras.distribution(extra)
        absent = self.loaded().absence(distribution)
        return None if absent is None else f"{distribution} {what}, but {absent} ({extras.install(extra)})"

    def unserved(self, thing: object, *, described: bool = False) -> str:
        """Return how to install the plugin for an object's library; "" if it is loaded or there is no such plugin."""
        extra = extras.serving(thing, described=described)
        return "" if extra is None else self.lacking("knows its library", extra) or ""

    def implements(self, hook: Callable[..., object], method: str) -> bool:
        """Whether the plugin that owns the method implements the hook; False if no plugin owns it."""
        catalog = self.loaded()
        return catalog.owners.get(method) in catalog.hooks[hook.__name__]

    def implementation(self, hook: Callable[..., object], method: str) -> pluggy.HookImpl | None:
        """Return the hook implementation of the method's plugin; None if there is none. Callers may keep the result."""
        catalog = self.loaded()
        owner = catalog.owners.get(method)
        caller = None if owner is None else catalog.hooks[hook.__name__].get(owner)
        return None if caller is None else caller.get_hookimpls()[0]

    def ask(self, hook: Callable[P, object], /, *args: P.args, **given: P.kwargs) -> Iterator[tuple[Plugin, Any]]:
        """Yield (plugin, answer) for each plugin with the hook; a plugin is called only when its answer is needed."""
        catalog = self.loaded()
        for plugin in catalog.asked(hook):
            with Asking(hook.__name__, plugin):
                answer = catalog.call(plugin, hook, given)
            yield plugin, answer

    def leave_out(self, plugin: Plugin, hook: Callable[..., object], error: BaseException, what: str = "") -> None:
        """Ignore a plugin's answers to ``hook`` from now on: warn once, and list the error in `methods`."""
        key, failed = (plugin, hook.__name__), f"failed and was left out: {what}{error_text(error)}"
        with self._lock:
            catalog = self.loaded()
            if plugin not in catalog.plugins or key in catalog.left_out:
                return
            left_out = {**catalog.left_out, key: f"{hook.__name__} {failed}"}
            self.catalog = attrs.evolve(catalog, left_out=left_out)
        warn(f"{hook.__name__} of {plugin} {failed}")

    def register(self, plugin: object) -> None:
        """Register an in-process plugin, for notebooks and tests.

        Args:
            plugin: A module with hook implementations, or an instance of a class with them.

        Raises:
            PluginError: The plugin is broken, or provides a method that is already there. Nothing is registered then.
        """
        entry = plugin.__name__ if isinstance(plugin, ModuleType | type) else type(plugin).__name__
        with self._lock:
            with Isolated(partial(_refuse, entry)):
                if plugin in [known.plugin for known in self.loaded().plugins]:
                    raise PluginError(f"the plugin {entry!r} is already registered")
                found = admit(manager_of([]), plugin, entry, MethodInfo(IN_PROCESS, ""))
            catalog = self.loaded()  # again, since the plugin's own code may have changed it
            taken = [name for name in found.methods if name in catalog.owners]
            if taken:
                owner = catalog.owners[taken[0]].info
                raise PluginError(
                    f"method {taken[0]!r} is already provided by {owner.distribution} {owner.version}".rstrip()
                    + "; give yours another name, or unregister that plugin first"
                )
            self.catalog = attrs.evolve(catalog, plugins=(*catalog.plugins, found))

    def unregister(self, plugin: object) -> None:
        """Remove a plugin and its methods.

        Args:
            plugin: The object that was passed to `register`.

        Raises:
            PluginError: The plugin is not registered.
        """
        with self._lock:
            catalog = self.loaded()
            plugins = tuple(known for known in catalog.plugins if known.plugin is not plugin)
            if len(plugins) == len(catalog.plugins):
                raise PluginError(f"{shown(plugin)} is not registered; pass the object that was given to register")
            left_out = {key: reason for key, reason in catalog.left_out.items() if key[0].plugin is not plugin}
            self.catalog = attrs.evolve(catalog, plugins=plugins, left_out=left_out)

    def reset(self) -> None:
        """Unload all plugins, including in-process ones. The next call reads the environment and loads them again."""
        with self._lock:
            self.catalog = None

    def _owner(self, name: str) -> Plugin:
        if name not in tuple((catalog := self.loaded()).owners):  # the name may be unhashable
            raise UnknownMethodError(catalog.missing(name))
        return catalog.owners[name]

    def loaded(self) -> Catalog:
        """Return the catalog of plugins. The first call loads the plugins, while it holds the lock."""
        if (catalog := self.catalog) is not None:
            return catalog
        with self._lock:
            # The lock is reentrant, so only a plugin that uses the registry during its own import gets here.
            if self._loading:
                raise PluginError("the plugins are still being loaded; a plugin must not use the registry at import")
            if self.catalog is None:
                self._loading = True
                try:
                    self.catalog = load(self._distributions)
                finally:
                    self._loading = False
            return self.catalog


def _refuse(entry: str, error: BaseException) -> NoReturn:
    if isinstance(error, PluginError):
        raise error
    raise PluginError(f"plugin {entry!r} cannot be registered: {error_text(error)}") from error


# One registry per process, so that a plugin is loaded and checked once for all models.
registry = Registry()
