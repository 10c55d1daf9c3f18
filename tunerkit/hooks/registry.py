"""The registry: which methods are installed, and how core calls one plugin or all of them."""

import threading
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import attrs
import pluggy

from tunerkit import extras
from tunerkit.errors import PluginError, UnknownMethodError, error_text, is_of_user, shown, warn
from tunerkit.hooks.loading import Catalog, load
from tunerkit.hooks.validation import Plugin, admit
from tunerkit.records import Method, MethodInfo

IN_PROCESS = "in-process"

P = ParamSpec("P")
R = TypeVar("R")


@attrs.frozen
class Answer:
    """One plugin's answer to a hook that is called on all plugins."""

    plugin: Plugin
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
        self._catalog: Catalog | None = None

    def get(self, name: str) -> Method:
        """Return the method with this name. Raises `UnknownMethodError` with close matches and failed plugins."""
        return self._owner(name).methods[name]

    def methods(self) -> dict[str, MethodInfo]:
        """List the installed methods and the plugins that failed to load.

        Returns:
            A record for each method, by its name. A plugin that failed is listed by the name of its entry point, with
            its error; so is one whose base layers, weight readers or default targets were left out of a model, though
            its methods work. If two distributions provide the same method, the rejected one is
            ``"name (distribution)"``.

        Raises:
            PluginError: ``TUNERKIT_PLUGINS`` names a plugin that is not installed.
        """
        return self._loaded().listed()

    def owner_of(self, method: str) -> MethodInfo:
        """Return the distribution and version that provide ``method``. Raises `UnknownMethodError`."""
        return self._owner(method).info

    def plugin_of(self, method: str) -> str:
        """Describe the plugin that owns ``method``, for an error."""
        return f"the plugin of method {method!r} ({self.owner_of(method).distribution})"

    def absence(self, distribution: str) -> str | None:
        """Say why no plugin of a distribution is loaded, and what to do; None if one is."""
        return self._loaded().absence(distribution)

    def unserved(self, thing: object) -> str:
        """Say how to get the plugin that knows the library of an object; empty if it is loaded, or if there is none."""
        extra = extras.serving(thing)
        absent = None if extra is None else self.absence(extras.distribution(extra))
        if extra is None or absent is None:
            return ""
        return f"{extras.distribution(extra)} knows its library, and {absent} ({extras.install(extra)})"

    def implements(self, hook: Callable[..., object], method: str) -> bool:
        """Whether the plugin that owns the method implements the hook; False if no plugin owns it."""
        return self.implementation(hook, method) is not None

    def implementation(self, hook: Callable[..., object], method: str) -> pluggy.HookImpl | None:
        """Return the implementation of a hook by the plugin that owns the method; None if it has none.

        It may be kept: plugins that come or go later do not change it.
        """
        catalog = self._loaded()
        owner = catalog.owners.get(method)
        own = [] if owner is None else catalog.implementations(hook.__name__)
        return next((each for each in own if owner is not None and each.plugin is owner.plugin), None)

    def watchers(self, hook: Callable[..., object]) -> pluggy.HookCaller:
        """Return what holds the implementations of a hook in all plugins, as they are at any time."""
        return self._loaded().manager.subset_hook_caller(hook.__name__, [])

    def plugin_at(self, plugin: object) -> str:
        """Describe a registered plugin, for a message."""
        return next((str(found) for found in self._loaded().plugins if found.plugin is plugin), repr(plugin))

    def call(self, hook: Callable[P, R], method: str, /, *args: P.args, **arguments: P.kwargs) -> R | None:
        """Call a hook, given as its spec, on the plugin that owns the method; None if it doesn't implement the hook.

        Pass arguments by name. Raises `PluginError` if the method is gone. Exceptions of the plugin propagate.
        """
        catalog = self._loaded()
        if method not in catalog.owners:
            raise PluginError(f"{hook.__name__} needs the plugin of method {method!r}: {catalog.missing(method)}")
        found = self.implementation(hook, method)
        return None if found is None else _call(found, **arguments)

    def ask(self, hook: Callable[P, object], /, *args: P.args, **arguments: P.kwargs) -> Iterator[Answer]:
        """Ask one plugin after another, as far as the caller iterates; ``trylast`` implementations come last.

        Raises:
            PluginError: A plugin raised what would end the program, such as SystemExit. Its other exceptions propagate
                with a note that names it.
        """

        def raise_named(found: Plugin, error: BaseException) -> None:
            if isinstance(error, Exception):
                if not isinstance(error, PluginError):
                    error.add_note(f"raised in {hook.__name__} of {found}")
                raise error
            raise PluginError(f"{hook.__name__} of {found} raised {error_text(error)}") from error

        return self._each(hook, arguments, raise_named)

    def gather(self, hook: Callable[P, object], /, *args: P.args, **arguments: P.kwargs) -> list[Answer]:
        """Ask every plugin: sorted by distribution, in-process ones last. One that raises is left out from then on."""

        def leave_out(found: Plugin, error: BaseException) -> None:
            self.leave_out(found, hook, error_text(error))

        return list(self._each(hook, arguments, leave_out))

    def kept(self, key: object, make: Callable[[], R]) -> R:
        """Return what ``make`` returns: the same until a plugin comes, goes or is left out."""
        known = self._loaded().known  # before: what is made from the plugins of now does not belong to later ones
        if key not in known:
            known[key] = make()
        found: R = known[key]
        return found

    def leave_out(self, found: Plugin, hook: Callable[..., object], reason: str) -> None:
        """Use no more of what a plugin answers to ``hook``: warn once, and list it in `methods`."""
        with self._lock:
            catalog = self._loaded()
            if found not in catalog.plugins or (found, hook.__name__) in catalog.left_out:
                return
            failed = f"failed and was left out: {reason}"
            catalog.left_out = {**catalog.left_out, (found, hook.__name__): f"{hook.__name__} {failed}"}
            catalog.known = {}
        warn(f"{hook.__name__} of {found} {failed}")

    def register(self, plugin: object) -> None:
        """Register an in-process plugin, for notebooks and tests.

        Args:
            plugin: A module with hook implementations, or an instance of a class with them.

        Raises:
            PluginError: The plugin is broken, or provides a method that is already there. Nothing is registered then.
        """
        entry = plugin.__name__ if isinstance(plugin, ModuleType | type) else type(plugin).__name__
        with self._lock:
            catalog = self._loaded()
            try:
                admitted = admit(catalog.manager, plugin, entry, MethodInfo(IN_PROCESS, ""))
            except BaseException as error:
                if isinstance(error, PluginError) or is_of_user(error):
                    raise
                raise PluginError(f"plugin {entry!r} cannot be registered: {error_text(error)}") from error
            taken = [name for name in admitted.methods if name in catalog.owners]
            if taken:
                catalog.manager.unregister(plugin)
                owner = catalog.owners[taken[0]].info
                raise PluginError(
                    f"method {taken[0]!r} is already provided by {owner.distribution} {owner.version}".rstrip()
                    + "; give yours another name, or unregister that plugin first"
                )
            catalog.add(admitted)

    def unregister(self, plugin: object) -> None:
        """Remove a plugin and its methods.

        Args:
            plugin: The object that was passed to `register`.

        Raises:
            PluginError: The plugin is not registered.
        """
        with self._lock:
            catalog = self._loaded()
            found = next((known for known in catalog.plugins if known.plugin is plugin), None)
            if found is None:
                raise PluginError(f"{shown(plugin)} is not registered; pass the object that was given to register")
            catalog.drop(found)

    def reset(self) -> None:
        """Forget all plugins, in-process ones too. The next call reads the environment and loads them again."""
        with self._lock:
            self._catalog = None

    def _each(
        self, hook: Callable[..., object], arguments: dict[str, Any], failed: Callable[[Plugin, BaseException], None]
    ) -> Iterator[Answer]:
        """Call the hook on each plugin. ``failed`` gets what one raises, unless the user ended the program."""
        catalog = self._loaded()
        plugins = {id(found.plugin): found for found in catalog.plugins}
        for implementation in catalog.implementations(hook.__name__):
            found = plugins.get(id(implementation.plugin))  # None for one that is being registered
            if found is None or (found, hook.__name__) in catalog.left_out:
                continue
            try:
                # A generator is exhausted here, so that its errors can name the plugin.
                value = _call(implementation, **arguments)
                value = tuple(value) if isinstance(value, Iterator) else value
            except BaseException as error:  # SystemExit too: a plugin must not end the user's program
                if is_of_user(error):
                    raise
                failed(found, error)
            else:
                if value is not None:
                    yield Answer(found, value)

    def _owner(self, name: str) -> Plugin:
        if name not in tuple((catalog := self._loaded()).owners):  # the name may be unhashable
            raise UnknownMethodError(catalog.missing(name))
        return catalog.owners[name]

    def _loaded(self) -> Catalog:
        """Return the catalog. The first use loads the plugins, under the lock.

        Reading takes no lock, since every change replaces what it changes: a thread that is interrupted while it holds
        one would stop all others for good.
        """
        if (catalog := self._catalog) is not None:
            return catalog
        with self._lock:
            # The lock is reentrant, so only a plugin that uses the registry during its own import gets here.
            if self._loading:
                raise PluginError("the plugins are still being loaded; a plugin must not use the registry at import")
            if self._catalog is None:
                self._loading = True
                try:
                    self._catalog = load(self._distributions)
                finally:
                    self._loading = False
            return self._catalog


def _call(implementation: pluggy.HookImpl, **arguments: Any) -> Any:
    """Call one plugin's implementation with those of the hook's arguments that it takes."""
    return implementation.function(*(arguments[name] for name in implementation.argnames))


# State of the process, as what is installed is: a plugin is loaded and checked once, whichever model asks.
registry = Registry()
