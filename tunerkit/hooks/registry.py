"""The registry: which methods are installed, and the one way to call the plugin that owns a method."""

import threading
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any
from warnings import warn

import attrs
import pluggy

from tunerkit.errors import PluginError, TunerkitWarning, UnknownMethodError, closest
from tunerkit.hooks import specs
from tunerkit.hooks.discovery import (
    VARIABLE,
    Failure,
    Source,
    canonical,
    discover,
    error_text,
    import_plugin,
    read_limit,
)
from tunerkit.hooks.markers import PROJECT
from tunerkit.hooks.validation import Plugin, admit, find_hook, heard_by
from tunerkit.records import Method, MethodInfo

IN_PROCESS = "in-process"


@attrs.frozen(eq=False)
class _Catalog:
    """What is loaded: pluggy's manager, the plugins in load order, the methods' owners, and what failed."""

    manager: pluggy.PluginManager
    limit: frozenset[str] | None
    plugins: list[Plugin] = attrs.field(factory=list)
    owners: dict[str, Plugin] = attrs.field(factory=dict)
    failures: list[Failure] = attrs.field(factory=list)


@attrs.frozen
class Answer:
    """What one plugin said to a hook that all are asked; ``plugin`` names it for messages."""

    plugin: str
    value: Any


class Registry:
    """The plugins of one process, loaded at the first question.

    ``distributions`` are searched for entry points of the group ``tunerkit``; None means all that are installed when
    the first question comes.
    """

    def __init__(self, distributions: Iterable[metadata.Distribution] | None = None) -> None:
        self._distributions = None if distributions is None else tuple(distributions)
        self._lock = threading.RLock()
        self._loading = False
        self._catalog: _Catalog | None = None

    def get(self, name: str) -> Method:
        """The method of that name, or `UnknownMethodError` with the closest names and the plugins that failed."""
        return _method(self._owner(name), name)

    def methods(self) -> dict[str, MethodInfo]:
        """What is installed, by name: methods, and under their entry point's name the plugins that failed, with why.

        A method refused because another distribution has its name stands as ``"name (distribution)"``.
        """
        with self._lock:
            catalog = self._loaded()
            found = {name: owner.source.info() for name, owner in catalog.owners.items()}
            for failure in catalog.failures:
                found[_free_name(failure, found)] = failure.info
        return dict(sorted(found.items()))

    def owner_of(self, method: str) -> MethodInfo:
        """The distribution and version that bring ``method``, or `UnknownMethodError`."""
        return self._owner(method).source.info()

    def implements(self, hook_name: str, method_name: str) -> bool:
        """Whether the plugin that owns the method implements the hook; False if no plugin owns it."""
        with self._lock:
            catalog = self._loaded()
            owner = catalog.owners.get(method_name)
            implementations = find_hook(catalog.manager, hook_name).get_hookimpls()
        return owner is not None and any(found.plugin is owner.plugin for found in implementations)

    # Any: a hook's result has the type its spec says, which a name known only at run time cannot carry.
    def call(self, hook_name: str, method_name: str, /, **arguments: object) -> Any:
        """Call the hook on the plugin that owns the method, and on no other; None if it doesn't implement the hook.

        Raises `PluginError` if the method is gone; what the plugin raises goes through unchanged.
        """
        with self._lock:
            catalog = self._loaded()
            owner = catalog.owners.get(method_name)
            if owner is None:
                why = _missing(catalog, method_name)
                raise PluginError(f"{hook_name} needs the plugin of method {method_name!r}: {why}")
            caller = heard_by(catalog.manager, hook_name, owner.plugin)
        return caller(**arguments)

    def call_all(self, hook_name: str, /, **arguments: object) -> list[Answer]:
        """Call the hook on each plugin that implements it: by their distributions' names, in-process ones last.

        Each is called alone: one that raises is named in a `TunerkitWarning` and left out, and the others are heard.
        """
        with self._lock:
            catalog = self._loaded()
            asked = [(found, heard_by(catalog.manager, hook_name, found.plugin)) for found in catalog.plugins]
        answers: list[Answer] = []
        for found, caller in asked:
            plugin = f"plugin {found.source.entry!r} ({found.source.distribution})"
            try:
                answers.extend(Answer(plugin, value) for value in _answers(caller(**arguments)))
            except Exception as error:
                text = f"{hook_name} of {plugin} failed and was left out: {error_text(error)}"
                warn(text, TunerkitWarning, stacklevel=2)
        return answers

    def register(self, plugin: object) -> None:
        """Add an in-process plugin: a module, or an instance of a class with hook implementations.

        Raises `PluginError` if it is broken or yields a method that is already there; nothing of it stays behind.
        """
        with self._lock:
            catalog = self._loaded()
            source = Source(getattr(plugin, "__name__", type(plugin).__name__), IN_PROCESS, "")
            admitted = admit(catalog.manager, plugin, source)
            for method in admitted.methods:
                if method.name in catalog.owners:
                    catalog.manager.unregister(plugin)
                    owner = catalog.owners[method.name].source
                    raise PluginError(
                        f"method {method.name!r} is already brought by {owner.distribution} {owner.version}".rstrip()
                        + "; give yours another name, or unregister that plugin first"
                    )
            catalog.plugins.append(admitted)
            catalog.owners.update({method.name: admitted for method in admitted.methods})

    def unregister(self, plugin: object) -> None:
        """Take a plugin and its methods away again, or raise `PluginError` if it isn't registered."""
        with self._lock:
            catalog = self._loaded()
            found = next((known for known in catalog.plugins if known.plugin is plugin), None)
            if found is None:
                raise PluginError(f"{plugin!r} is not registered; pass the object that was given to register")
            _drop(catalog, found)

    def reset(self) -> None:
        """Forget everything, in-process plugins too: the next question reads the environment and loads afresh."""
        with self._lock:
            self._catalog = None

    def _owner(self, name: str) -> Plugin:
        with self._lock:
            catalog = self._loaded()
            if name not in tuple(catalog.owners):  # what was given need not be hashable
                raise UnknownMethodError(_missing(catalog, name))
            return catalog.owners[name]

    def _loaded(self) -> _Catalog:
        """The catalog; the caller holds the lock."""
        if self._catalog is None:
            # The lock lets its own thread in again: only a plugin that asks while it is imported comes here twice.
            if self._loading:
                raise PluginError("the plugins are still being loaded; a plugin must not ask for methods at import")
            self._loading = True
            try:
                self._catalog = _load(self._distributions)
            finally:
                self._loading = False
        return self._catalog


def _load(distributions: Iterable[metadata.Distribution] | None) -> _Catalog:
    """Load every plugin on its own, then settle which of two plugins keeps a method."""
    sources, failures = discover(metadata.distributions() if distributions is None else distributions)
    limit = read_limit(sources)
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(specs)
    catalog = _Catalog(manager, limit, failures=failures if limit is None else [])
    for source in sources:
        if limit is None or source.entry in limit:
            try:
                catalog.plugins.append(admit(manager, import_plugin(source), source))
            # SystemExit: a module that ends the process at import is as broken as one that raises.
            except (Exception, SystemExit) as error:
                catalog.failures.append(Failure(source.entry, source.info(error_text(error))))
    _settle(catalog)
    return catalog


def _settle(catalog: _Catalog) -> None:
    """Give each method one owner: the distribution named after it, else the first by name. Plugins left without go."""
    claims: dict[str, list[Plugin]] = {}
    for found in catalog.plugins:
        for method in found.methods:
            claims.setdefault(method.name, []).append(found)
    for name, plugins in claims.items():
        namesake = canonical(f"tunerkit-{name}")
        owner, *others = sorted(plugins, key=lambda found: found.source.distribution != namesake)
        catalog.owners[name] = owner
        for other in others:
            loser = other.source.distribution
            error = (
                f"method {name!r} is also brought by {owner.source.distribution}, which keeps it; {loser}'s is left out"
            )
            catalog.failures.append(Failure(f"{name} ({loser})", other.source.info(error)))
    owning = {id(owner) for owner in catalog.owners.values()}
    for found in [found for found in catalog.plugins if found.methods and id(found) not in owning]:
        _drop(catalog, found)


def _drop(catalog: _Catalog, found: Plugin) -> None:
    catalog.manager.unregister(found.plugin)
    catalog.plugins.remove(found)
    for name in [name for name, owner in catalog.owners.items() if owner is found]:
        del catalog.owners[name]


def _answers(result: Any) -> list[Any]:
    """One plugin's answers, generators run out: they would raise later, where nobody knows whose they are."""
    return [tuple(answer) if isinstance(answer, Iterator) else answer for answer in result]


def _method(owner: Plugin, name: str) -> Method:
    return next(method for method in owner.methods if method.name == name)


def _free_name(failure: Failure, taken: Iterable[str]) -> str:
    """The failure's name, with its distribution and then a number behind it while that is taken."""
    name, number = failure.name, 1
    while name in taken:
        name = f"{failure.name} ({failure.info.distribution})" + (f" {number}" if number > 1 else "")
        number += 1
    return name


def _missing(catalog: _Catalog, name: str) -> str:
    """Why there is no such method: what is installed, what is close, what failed, what was kept out."""
    installed = ", ".join(sorted(catalog.owners)) or "none (each is a distribution of its own, such as tunerkit-lora)"
    parts = [f"no method named {name!r}; installed: {installed}{closest(str(name), catalog.owners)}"]
    for failure in catalog.failures:
        whose = f"{failure.info.distribution} {failure.info.version}".rstrip()
        parts.append(f"not loaded: {failure.name!r} of {whose}: {failure.info.error}")
    if catalog.limit is not None:
        parts.append(f"{VARIABLE} limits loading to: {', '.join(sorted(catalog.limit)) or 'none'}")
    return "\n".join(parts)


# State of the process, as what is installed is: a plugin is loaded and checked once, whichever model asks.
registry = Registry()
