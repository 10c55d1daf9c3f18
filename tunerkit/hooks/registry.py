"""The registry: which methods are installed, and how core calls the plugin that owns a method."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any, ParamSpec, TypeVar
from warnings import warn

import attrs
import pluggy

from tunerkit.errors import PluginError, TunerkitWarning, UnknownMethodError, closest
from tunerkit.hooks import specs
from tunerkit.hooks.discovery import VARIABLE, Failure, canonical, discover, error_text, import_plugin, read_limit
from tunerkit.hooks.markers import PROJECT
from tunerkit.hooks.validation import Plugin, admit, heard_by
from tunerkit.records import Method, MethodInfo

IN_PROCESS = "in-process"

P = ParamSpec("P")
R = TypeVar("R")


@attrs.define(eq=False)
class _Catalog:
    """The loaded state: pluggy's manager, the plugins in load order, each method's owner, and the failures."""

    manager: pluggy.PluginManager
    limit: frozenset[str] | None
    plugins: list[Plugin] = attrs.field(factory=list)
    owners: dict[str, Plugin] = attrs.field(factory=dict)
    failures: list[Failure] = attrs.field(factory=list)

    def drop(self, found: Plugin) -> None:
        """Unregister a plugin, and forget it as the owner of its methods."""
        self.manager.unregister(found.plugin)
        self.plugins.remove(found)
        self.owners = {name: owner for name, owner in self.owners.items() if owner is not found}


@attrs.frozen
class Answer:
    """One plugin's answer to a hook that is called on all plugins; ``plugin`` names it in messages."""

    plugin: str
    value: Any


class Registry:
    """The plugins of one process, loaded at the first call.

    ``distributions`` are searched for entry points of the group ``tunerkit``. None means all that are installed at the
    first call.
    """

    def __init__(self, distributions: Iterable[metadata.Distribution] | None = None) -> None:
        self._distributions = None if distributions is None else tuple(distributions)
        self._lock = threading.RLock()
        self._loading = False
        self._catalog: _Catalog | None = None

    def get(self, name: str) -> Method:
        """Return the method with this name. Raises `UnknownMethodError` with close matches and failed plugins."""
        return self._owner(name).methods[name]

    def methods(self) -> dict[str, MethodInfo]:
        """List the installed methods and the plugins that failed to load.

        Returns:
            A record for each method, by its name. A plugin that failed is listed by the name of its entry point, with
            its error. If two distributions provide the same method, the rejected one is ``"name (distribution)"``.

        Raises:
            PluginError: ``TUNERKIT_PLUGINS`` names a plugin that is not installed.
        """
        with self._loaded() as catalog:
            found = {name: owner.info for name, owner in catalog.owners.items()}
            for name, info in catalog.failures:
                while name in found:
                    name = f"{name} ({info.distribution})"
                found[name] = info
        return dict(sorted(found.items()))

    def owner_of(self, method: str) -> MethodInfo:
        """Return the distribution and version that provide ``method``. Raises `UnknownMethodError`."""
        return self._owner(method).info

    def plugin_of(self, method: str) -> str:
        """Describe the plugin that owns ``method``, for an error."""
        return f"the plugin of method {method!r} ({self.owner_of(method).distribution})"

    def implements(self, hook: Callable[..., object], method: str) -> bool:
        """Whether the plugin that owns the method implements the hook; False if no plugin owns it."""
        with self._loaded() as catalog:
            owner = catalog.owners.get(method)
            # No plugin is None, so without an owner the caller reaches nobody.
            caller = heard_by(catalog.manager, hook.__name__, owner and owner.plugin)
        return bool(caller.get_hookimpls())

    def call(self, hook: Callable[P, R], method: str, /, *args: P.args, **arguments: P.kwargs) -> R | None:
        """Call a hook, given as its spec, on the plugin that owns the method; None if it doesn't implement the hook.

        Pass arguments by name. Raises `PluginError` if the method is gone. Exceptions of the plugin propagate.
        """
        with self._loaded() as catalog:
            owner = catalog.owners.get(method)
            if owner is None:
                raise PluginError(f"{hook.__name__} needs the plugin of method {method!r}: {_missing(catalog, method)}")
            caller = heard_by(catalog.manager, hook.__name__, owner.plugin)
        found: R | None = caller(**arguments)
        return found

    def call_all(self, hook: Callable[P, object], /, *args: P.args, **arguments: P.kwargs) -> list[Answer]:
        """Call the hook on every plugin that implements it: sorted by distribution, in-process plugins last.

        Each plugin is called separately. If one raises, a `TunerkitWarning` names it, and the others are still called.
        """
        with self._loaded() as catalog:
            asked = [(found, heard_by(catalog.manager, hook.__name__, found.plugin)) for found in catalog.plugins]
        answers: list[Answer] = []
        for found, caller in asked:
            plugin = f"plugin {found.entry!r} ({found.info.distribution})"
            try:
                # Generators are exhausted here, so that their errors can name the plugin.
                values = [tuple(value) if isinstance(value, Iterator) else value for value in caller(**arguments)]
                answers += [Answer(plugin, value) for value in values]
            except Exception as error:
                text = f"{hook.__name__} of {plugin} failed and was left out: {error_text(error)}"
                warn(text, TunerkitWarning, stacklevel=2)
        return answers

    def register(self, plugin: object) -> None:
        """Register an in-process plugin, for notebooks and tests.

        Args:
            plugin: A module with hook implementations, or an instance of a class with them.

        Raises:
            PluginError: The plugin is broken, or provides a method that is already there. Nothing is registered then.
        """
        entry = plugin.__name__ if isinstance(plugin, ModuleType | type) else type(plugin).__name__
        with self._loaded() as catalog:
            admitted = admit(catalog.manager, plugin, entry, MethodInfo(IN_PROCESS, ""))
            taken = [name for name in admitted.methods if name in catalog.owners]
            if taken:
                catalog.manager.unregister(plugin)
                owner = catalog.owners[taken[0]].info
                raise PluginError(
                    f"method {taken[0]!r} is already provided by {owner.distribution} {owner.version}".rstrip()
                    + "; give yours another name, or unregister that plugin first"
                )
            catalog.plugins.append(admitted)
            catalog.owners.update(dict.fromkeys(admitted.methods, admitted))

    def unregister(self, plugin: object) -> None:
        """Remove a plugin and its methods.

        Args:
            plugin: The object that was passed to `register`.

        Raises:
            PluginError: The plugin is not registered.
        """
        with self._loaded() as catalog:
            found = next((known for known in catalog.plugins if known.plugin is plugin), None)
            if found is None:
                raise PluginError(f"{plugin!r} is not registered; pass the object that was given to register")
            catalog.drop(found)

    def reset(self) -> None:
        """Forget all plugins, in-process ones too. The next call reads the environment and loads them again."""
        with self._lock:
            self._catalog = None

    def _owner(self, name: str) -> Plugin:
        with self._loaded() as catalog:
            if name not in tuple(catalog.owners):  # the name may be unhashable
                raise UnknownMethodError(_missing(catalog, name))
            return catalog.owners[name]

    @contextmanager
    def _loaded(self) -> Iterator[_Catalog]:
        """Hold the lock while the caller uses the catalog. The first use loads the plugins."""
        with self._lock:
            # The lock is reentrant, so only a plugin that uses the registry during its own import gets here.
            if self._loading:
                raise PluginError("the plugins are still being loaded; a plugin must not use the registry at import")
            if self._catalog is None:
                self._loading = True
                try:
                    self._catalog = _load(self._distributions)
                finally:
                    self._loading = False
            yield self._catalog


def _load(distributions: Iterable[metadata.Distribution] | None) -> _Catalog:
    """Load each plugin separately, then decide which plugin owns each method."""
    sources, failures = discover(metadata.distributions() if distributions is None else distributions)
    limit = read_limit(point.name for point, _ in sources)
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specs)
    catalog = _Catalog(manager, limit, failures=failures if limit is None else [])
    for point, info in sources:
        if limit is None or point.name in limit:
            try:
                catalog.plugins.append(admit(manager, import_plugin(point), point.name, info))
            # SystemExit too: a module that exits at import is as broken as one that raises.
            except (Exception, SystemExit) as error:
                catalog.failures.append((point.name, attrs.evolve(info, error=error_text(error))))
    _settle(catalog)
    return catalog


def _settle(catalog: _Catalog) -> None:
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
    for found in list(catalog.plugins):
        if found.methods and found not in catalog.owners.values():
            catalog.drop(found)


def _missing(catalog: _Catalog, name: str) -> str:
    """Explain why a method is missing: what is installed, close matches, failed plugins, and the limit on loading."""
    installed = ", ".join(sorted(catalog.owners)) or "none (each is a separate distribution, such as tunerkit-lora)"
    parts = [f"no method named {name!r}; installed: {installed}{closest(str(name), catalog.owners)}"]
    for failed, info in catalog.failures:
        whose = f"{info.distribution} {info.version}".rstrip()
        parts.append(f"not loaded: {failed!r} of {whose}: {info.error}")
    if catalog.limit is not None:
        parts.append(f"{VARIABLE} limits loading to: {', '.join(sorted(catalog.limit)) or 'none'}")
    return "\n".join(parts)


# State of the process, as what is installed is: a plugin is loaded and checked once, whichever model asks.
registry = Registry()
