"""Find the installed plugins, load and check each of them separately, and decide which one provides each method."""

import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from importlib import metadata
from inspect import getattr_static, isclass, isfunction
from typing import Any

import attrs
import pluggy

from tunerkit.config import AdapterConfig
from tunerkit.errors import PluginError, TunerkitError, closest, error_text, is_of_user, shown
from tunerkit.extras import hints
from tunerkit.hooks import specs
from tunerkit.paths import few
from tunerkit.records import Method, MethodInfo, RecordError, Unfit

GROUP = "tunerkit"
VARIABLE = "TUNERKIT_PLUGINS"
IN_PROCESS = "in-process"
# The version of the plugin API, and the oldest version that still works; docs/authors/write-a-method.md has the rules
# for changes.
API, OLDEST_API = 2, 1
API_NAME = "TUNERKIT_API"
# The hooks, and whether a hook calls only the plugin that owns the method. Other hooks return a list of answers.
HOOKS: Mapping[str, bool] = {
    name: vars(spec)[f"{specs.PROJECT}_spec"]["firstresult"]
    for name, spec in vars(specs).items()
    if name.startswith("tunerkit_")
}
Failure = tuple[str, MethodInfo]
_NAME_FIRST = "; the name comes before the config: tunerkit.wrap(model, 'lora', config)"


@attrs.frozen(eq=False)
class Plugin:
    """A plugin that passed all checks. ``entry`` is its entry point, or the module or class of an in-process plugin."""

    plugin: object
    entry: str
    info: MethodInfo
    methods: Mapping[str, Method]
    api: int

    def __str__(self) -> str:
        return f"plugin {self.entry!r} ({self.info.distribution})"

    @property
    def way_out(self) -> str:
        """Advice on how to run without the plugin, for the end of a message."""
        if self.info.distribution == IN_PROCESS:
            return "to run without it, pass it to tunerkit.unregister"
        return f"to run without it, list the plugins that may load in the environment variable {VARIABLE}"


def blame(error: BaseException, what: str, whose: object, place: str = "") -> None:
    """Add a note to a plugin's exception, with the function ``what``, the plugin ``whose`` and the subject ``place``.

    Raises `PluginError` instead if the exception reports an invalid answer, or would end the program, like SystemExit.
    ``whose`` is a `Plugin` or a description of one.
    """
    if is_of_user(error):
        return
    way_out = f"; {whose.way_out}" if isinstance(whose, Plugin) else ""
    at = f" for {place}" if place else ""
    if isinstance(error, Unfit):
        answer = f"returned {error.found}{at}; it must return {error.expected}"
        raise PluginError(f"{what} of {whose} {answer}{way_out}") from None
    if isinstance(error, RecordError):  # its traceback leads to the line of the plugin
        raise PluginError(f"{what} of {whose} failed{at}: {error}{way_out}") from error
    if not isinstance(error, Exception):
        raise PluginError(f"{what} of {whose} raised {error_text(error)}{at}{way_out}") from error
    way_out = "" if isinstance(error, TunerkitError) else way_out  # tunerkit's own messages have their advice
    error.add_note(f"raised by {what} of {whose}{',' * bool(place)}{at}{way_out}")


@attrs.frozen
class Asking(AbstractContextManager[object]):
    """Context manager for a call of a plugin: if the call raises, call `blame` with the exception and these fields."""

    what: str
    whose: object
    place: str = ""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            blame(error, self.what, self.whose, self.place)


@attrs.frozen
class Isolated(AbstractContextManager[object]):
    """Context manager that passes any exception except Ctrl-C to ``failed`` and suppresses it, even SystemExit."""

    failed: Callable[[BaseException], None]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None or is_of_user(error):
            return False
        self.failed(error)
        return True


@attrs.frozen(eq=False)
class Catalog:
    """A snapshot of a registry's plugins in load order. A change makes a new catalog, so that readers need no lock.

    ``failures`` are plugins that could not be loaded or are not used. ``left_out`` maps (plugin, hook) to the reason
    why the plugin's answers are ignored. ``limit`` has the entry points that may load; None allows all. ``owners`` maps
    a method to the plugin of its namesake distribution, else to the first plugin with it. ``hooks`` maps each hook to
    pluggy's callers of single plugins, in call order: by distribution, then in-process, ``trylast`` last. ``known`` is
    a cache.
    """

    plugins: tuple[Plugin, ...]
    failures: tuple[Failure, ...] = ()
    limit: frozenset[str] | None = None
    left_out: Mapping[tuple[Plugin, str], str] = attrs.field(factory=dict)
    owners: Mapping[str, Plugin] = attrs.field(init=False)
    hooks: Mapping[str, Mapping[Plugin, pluggy.HookCaller]] = attrs.field(init=False)
    known: dict[object, Any] = attrs.field(init=False, factory=dict)

    @owners.default
    def _owners(self) -> dict[str, Plugin]:
        found: dict[str, Plugin] = {}
        for plugin in self.plugins:
            for name in plugin.methods:
                namesake = _canonical(f"tunerkit-{name}")
                if name not in found or plugin.info.distribution == namesake != found[name].info.distribution:
                    found[name] = plugin
        return found

    @hooks.default
    def _hooks(self) -> dict[str, dict[Plugin, pluggy.HookCaller]]:
        manager, known = manager_of(self.plugins), {id(each.plugin): each for each in self.plugins}
        found: dict[str, dict[Plugin, pluggy.HookCaller]] = {}
        for name in HOOKS:
            impls = {id(each.plugin): each for each in vars(manager.hook)[name].get_hookimpls()}  # in pluggy's order
            mine = [impls[each] for each in known if each in impls]
            own = [each.plugin for each in sorted(mine, key=lambda each: (each.trylast, not each.tryfirst))]
            found[name] = {
                known[id(plugin)]: manager.subset_hook_caller(name, [each for each in own if each is not plugin])
                for plugin in own
            }
        return found

    def asked(self, hook: Callable[..., object]) -> list[Plugin]:
        """Return the plugins that implement a hook, in call order, without plugins that were left out."""
        name = hook.__name__
        return [plugin for plugin in self.hooks[name] if (plugin, name) not in self.left_out]

    def call(self, plugin: Plugin, hook: Callable[..., object], given: Mapping[str, object]) -> Any:
        """Return a plugin's answer to a hook; None if it does not implement the hook. A generator becomes a tuple."""
        if (caller := self.hooks[hook.__name__].get(plugin)) is None:
            return None
        answer: Any = caller(**given)
        if not HOOKS[hook.__name__]:
            answer = answer[0] if answer else None
        # A method's state may be any object, even an iterator.
        return tuple(answer) if isinstance(answer, Iterator) and hook is not specs.tunerkit_start else answer

    def owner_of(self, method: str, hook: Callable[..., object]) -> Plugin:
        """Return the plugin that owns a method. Raises `PluginError`, which names ``hook``, if no plugin owns it."""
        if method not in self.owners:
            raise PluginError(f"{hook.__name__} needs the plugin of method {method!r}: {self.missing(method)}")
        return self.owners[method]

    def listed(self) -> dict[str, MethodInfo]:
        """Return a record for each method, by name, and for each failure, by the name of its entry point."""
        found = {name: owner.info for name, owner in self.owners.items()}
        in_part = [(key[0].entry, attrs.evolve(key[0].info, error=text)) for key, text in self.left_out.items()]
        for name, info in (*self.failures, *in_part):
            while name in found:
                name = f"{name} ({info.distribution})"
            found[name] = info
        return dict(sorted(found.items()))

    def missing(self, name: object) -> str:
        """Return a message on a missing method: similar and installed methods, failed plugins, and which may load."""
        installed = (
            few(sorted(self.owners), shown=40) or "none (each is a separate distribution, such as tunerkit-lora)"
        )
        hint = closest(name, self.owners) if isinstance(name, str) else _NAME_FIRST
        if (reason := hints("methods").get(str(name).lower().replace("_", "-"))) is not None:
            hint = f"; {reason}"
        parts = [f"no method named {shown(name)}; installed: {installed}{hint}"]
        for failed, info in self.failures:
            whose = f"{info.distribution} {info.version}".rstrip()
            parts.append(f"not loaded: {failed!r} of {whose}: {info.error}")
        if self.limit is not None:
            parts.append(f"{VARIABLE} limits loading to: {', '.join(sorted(self.limit)) or 'none'}")
        return "\n".join(parts)

    def absence(self, distribution: str) -> str | None:
        """Return why no plugin of a distribution is loaded; None if one is loaded."""
        if distribution in {found.info.distribution for found in self.plugins}:
            return None
        failed = next((info for _, info in self.failures if info.distribution == distribution), None)
        if failed is not None:
            return f"{distribution} cannot be used: {failed.error}; another version may work"
        if self.limit is not None:
            return f"{distribution} is not loaded, or not installed: {VARIABLE} limits what is loaded"
        return f"{distribution} is not installed"


# --- What is installed ------------------------------------------------------------------------------------------------


def load(distributions: Iterable[metadata.Distribution] | None) -> Catalog:
    """Load each plugin separately, then decide which plugin owns each method.

    An exception at a plugin's import, even SystemExit, is recorded as the plugin's failure. Only the user's own Ctrl-C
    is raised. A plugin is not used if all of its methods belong to other plugins.
    """
    sources, unreadable = _discover(metadata.distributions() if distributions is None else distributions)
    limit = _read_limit(point.name for point, _ in sources)
    manager, plugins = manager_of([]), list[Plugin]()
    failures = unreadable if limit is None else []

    def failed(name: str, info: MethodInfo, why: BaseException | str) -> None:
        failures.append((name, attrs.evolve(info, error=why if isinstance(why, str) else error_text(why))))

    for point, info in sources:
        if limit is None or point.name in limit:
            with Isolated(partial(failed, point.name, info)):
                if not point.pattern.match(point.value):
                    raise PluginError(f"its entry point is not a module: {point.value!r}")
                plugin = point.load()
                if (same := next((known for known in plugins if known.plugin is plugin), None)) is not None:
                    raise PluginError(f"it is loaded already, as {same}")
                plugins.append(admit(manager, plugin, point.name, info))
    owners = Catalog(tuple(plugins)).owners
    for found in plugins:
        for name in found.methods:
            if (owner := owners[name]) is not found:
                why = (
                    f"method {name!r} is also provided by {owner.info.distribution}, which is used; "
                    f"{found.info.distribution}'s is left out. To use it, list the plugins that may load in the "
                    f"environment variable {VARIABLE}, without {owner.entry!r}"
                )
                failed(f"{name} ({found.info.distribution})", found.info, why)
    used = [found for found in plugins if not found.methods or found in owners.values()]
    return Catalog(tuple(used), tuple(failures), limit)


def _discover(
    distributions: Iterable[metadata.Distribution],
) -> tuple[list[tuple[metadata.EntryPoint, MethodInfo]], list[Failure]]:
    """Return the entry points of `GROUP`, sorted by distribution, and the distributions that cannot be read.

    If a distribution is installed twice, only the first one on the path counts, as for Python's imports. A second
    installation of another version is listed as a failure.
    """
    sources: dict[str, list[tuple[metadata.EntryPoint, MethodInfo]]] = {}
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
    """Normalize a distribution's name as the packaging standard does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _read_limit(installed: Iterable[str]) -> frozenset[str] | None:
    """Return the entry points that the environment variable allows; None allows all.

    Raises `PluginError` if an allowed entry point is not installed.
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


# --- Checks of a plugin -----------------------------------------------------------------------------------------------


def manager_of(plugins: Iterable[Plugin]) -> pluggy.PluginManager:
    """Return a pluggy manager with these plugins."""
    manager = pluggy.PluginManager(specs.PROJECT)
    manager.add_hookspecs(specs)
    for each in plugins:
        _register(manager, each.plugin, each.entry)
    return manager


def _register(manager: pluggy.PluginManager, plugin: object, entry: str) -> None:
    manager.register(plugin, str(id(plugin)) if manager.has_plugin(entry) else entry)  # two may have one entry


def admit(manager: pluggy.PluginManager, plugin: object, entry: str, info: MethodInfo) -> Plugin:
    """Check a plugin, register it in the manager, and return its record. Raises `PluginError` if it is broken."""
    api = _read_api(plugin)
    _check_hooks(manager, plugin)
    try:
        _register(manager, plugin, entry)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a hook implementation does not match its spec: {error_text(error)}") from error
    callers = manager.get_hookcallers(plugin) or ()
    hooks = {each.name: impl.function for each in callers for impl in each.get_hookimpls() if impl.plugin is plugin}
    with ExitStack() as undo:
        undo.callback(manager.unregister, plugin)  # a second entry point may load the same plugin
        found = Plugin(plugin, entry, info, _methods_of(hooks), api)
        undo.pop_all()
    return found


def _read_api(plugin: object) -> int:
    """Return the API version that a plugin was written for, by default 1. Raises `PluginError` for other versions."""
    wanted: object = getattr(plugin, API_NAME, 1)
    if type(wanted) is not int or wanted < 1:
        raise PluginError(
            f"{API_NAME} is {shown(wanted)}; expected the version of the plugin API, as in {API_NAME} = {API}"
        )
    if not OLDEST_API <= wanted <= API:
        older = "tunerkit" if wanted > API else "version of the plugin"
        supported = f"this tunerkit supports {OLDEST_API} to {API}"
        raise PluginError(f"it was written for {API_NAME} {wanted}, and {supported}; install a newer {older}")
    return wanted


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Raise `PluginError` if a plugin has no hooks, or a hook is misspelled, unmarked, a wrapper or duplicated."""
    if not isinstance(plugin, Hashable):
        raise PluginError(f"a plugin must be hashable, and {type(plugin).__name__} is not")
    marked = {name: found for name in dir(plugin) if (found := manager.parse_hookimpl_opts(plugin, name)) is not None}
    unmarked = [name for name in sorted(HOOKS.keys() - marked.keys()) if isfunction(getattr_static(plugin, name, None))]
    problems = [f"{name} is not marked @tunerkit.hookimpl" for name in unmarked]
    first: dict[str, str] = {}
    for attribute, options in marked.items():
        name = options.get("specname") or attribute
        # An optional hook may belong to a newer tunerkit.
        if name not in HOOKS and not options.get("optionalhook"):
            problems.append(f"there is no hook {name!r} in this version of tunerkit{closest(name, HOOKS)}")
        if options.get("wrapper") or options.get("hookwrapper"):
            problems.append(f"{attribute} is a hook wrapper, which is not supported: plugins are called one at a time")
        if isclass(plugin) and isfunction(getattr_static(plugin, attribute)):
            problems.append(f"{attribute} is an instance method: pass an instance, {plugin.__name__}()")
        if first.setdefault(name, attribute) != attribute:
            problems.append(f"{first[name]} and {attribute} both implement {name}: make them one function")
    if problems:
        raise PluginError("; ".join(problems))
    if not marked:
        raise PluginError(
            f"{shown(plugin)} is not a plugin: it implements no hook; mark its functions @tunerkit.hookimpl"
        )


def _methods_of(hooks: Mapping[str, Callable[..., Any]]) -> dict[str, Method]:
    """Return the plugin's `Method` records by name. Raises `PluginError` for an invalid record or a missing hook."""
    methods: dict[str, Method] = {}
    for method in hooks.get("tunerkit_methods", tuple)() or ():
        if not isinstance(method, Method):
            raise PluginError(f"tunerkit_methods yielded {shown(method)}; expected a tunerkit.plugin.Method")
        # attrs.has also accepts an undecorated subclass of an attrs class, whose new fields would be ignored.
        own = issubclass(method.config, AdapterConfig) and method.config is not AdapterConfig
        if not (own and "__attrs_attrs__" in vars(method.config)):
            raise PluginError(
                f"the config of method {method.name!r} is {shown(method.config)}; "
                "expected an attrs class derived from tunerkit.plugin.AdapterConfig"
            )
        if method.name in methods:
            raise PluginError(f"tunerkit_methods yielded {method.name!r} twice")
        methods[method.name] = method
    if methods and "tunerkit_build_adapter" not in hooks:
        raise PluginError(f"it provides the method {next(iter(methods))!r} but has no tunerkit_build_adapter for it")
    calibrated = [name for name, method in methods.items() if method.statistics is not None]
    if calibrated and "tunerkit_calibrate" not in hooks:
        raise PluginError(f"its method {calibrated[0]!r} requests statistics, but there is no hook tunerkit_calibrate")
    return methods
