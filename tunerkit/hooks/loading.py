"""Find the plugins that are installed, load and check each by itself, and decide which one provides each method."""

import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from tunerkit.records import Method, MethodInfo, StatisticsRequest, mistyped, type_name

GROUP = "tunerkit"
VARIABLE = "TUNERKIT_PLUGINS"
IN_PROCESS = "in-process"
# The version of the contract between core and plugins, and the oldest that still works;
# docs/authors/write-a-plugin.md says what may change when.
API, OLDEST_API = 2, 1
API_NAME = "TUNERKIT_API"
HOOKS = frozenset(name for name in dir(specs) if name.startswith("tunerkit_"))
Failure = tuple[str, MethodInfo]
_NAME_FIRST = "; the name comes before the config: tunerkit.wrap(model, 'lora', config)"


@attrs.frozen(eq=False)
class Plugin:
    """A plugin that passed all checks. One in process has the name of its module or class as its ``entry``."""

    plugin: object
    entry: str
    info: MethodInfo
    hooks: Mapping[str, pluggy.HookImpl]
    methods: Mapping[str, Method]
    api: int

    def __str__(self) -> str:
        return f"plugin {self.entry!r} ({self.info.distribution})"

    @property
    def way_out(self) -> str:
        """How to run without the plugin, for messages about what it does to others."""
        if self.info.distribution == IN_PROCESS:
            return "to run without it, pass it to tunerkit.unregister"
        return f"to run without it, list the plugins that may load in the environment variable {VARIABLE}"

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call its implementation of a hook with those arguments that it takes; a generator is read to its end."""
        answer = self.hooks[hook].function(*(arguments[name] for name in self.hooks[hook].argnames))
        return tuple(answer) if isinstance(answer, Iterator) else answer

    @contextmanager
    def naming(self, what: str) -> Iterator[None]:
        """Name the plugin in an error. Raises `PluginError` instead of what would end the program, as SystemExit."""
        try:
            yield
        except BaseException as error:
            if is_of_user(error):
                raise
            if not isinstance(error, Exception):
                raise PluginError(f"{what} of {self} raised {error_text(error)}; {self.way_out}") from error
            way_out = "" if isinstance(error, TunerkitError) else f"; {self.way_out}"  # a message of ours has its own
            error.add_note(f"raised in {what} of {self}{way_out}")
            raise


@attrs.frozen(eq=False)
class Catalog:
    """The plugins of a registry in load order. What changes them makes a new catalog: a thread reads one of the two.

    ``failures`` could not be loaded, or are not used. ``left_out`` says why a plugin's answer to a hook is not used,
    ``known`` has the answers to hooks that ask what plugins know. ``limit`` names the entry points that may load; None
    allows all. A method belongs to the plugin of the distribution that is named after it, else to the first.
    """

    plugins: tuple[Plugin, ...]
    failures: tuple[Failure, ...] = ()
    limit: frozenset[str] | None = None
    left_out: Mapping[tuple[Plugin, str], str] = attrs.field(factory=dict)
    owners: Mapping[str, Plugin] = attrs.field(init=False)
    hooks: Mapping[str, tuple[Plugin, ...]] = attrs.field(init=False)
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
    def _hooks(self) -> dict[str, tuple[Plugin, ...]]:
        def in_order(name: str) -> tuple[Plugin, ...]:
            own = [plugin for plugin in self.plugins if name in plugin.hooks]
            return tuple(sorted(own, key=lambda each: (each.hooks[name].trylast, not each.hooks[name].tryfirst)))

        return {name: in_order(name) for name in HOOKS}

    def asked(self, hook: Callable[..., object]) -> list[Plugin]:
        """Return the plugins to ask: sorted by distribution, in-process ones after them, ``trylast`` at the end."""
        name = hook.__name__
        return [plugin for plugin in self.hooks[name] if (plugin, name) not in self.left_out]

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
        """Say why no plugin of a distribution is loaded, and what to do; None if one is."""
        if any(found.info.distribution == distribution for found in self.plugins):
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

    Whatever a plugin raises while it is imported counts as its failure, including SystemExit. Only the user's own
    Ctrl-C ends the loading. A plugin whose methods all went to others is not used.
    """
    sources, unreadable = _discover(metadata.distributions() if distributions is None else distributions)
    limit = _read_limit(point.name for point, _ in sources)
    plugins: list[Plugin] = []
    failures = unreadable if limit is None else []
    for point, info in sources:
        if limit is None or point.name in limit:
            try:
                if not point.pattern.match(point.value):
                    raise PluginError(f"its entry point is not a module: {point.value!r}")
                plugin = point.load()
                if (same := next((known for known in plugins if known.plugin is plugin), None)) is not None:
                    raise PluginError(f"it is loaded already, as {same}")
                plugins.append(admit(plugin, point.name, info))
            except BaseException as error:
                if is_of_user(error):
                    raise
                failures.append((point.name, attrs.evolve(info, error=error_text(error))))
    owners = Catalog(tuple(plugins)).owners
    for found in plugins:
        for name in found.methods:
            if (owner := owners[name]) is not found:
                why = (
                    f"method {name!r} is also provided by {owner.info.distribution}, which is used; "
                    f"{found.info.distribution}'s is left out. To use it, list the plugins that may load in the "
                    f"environment variable {VARIABLE}, without {owner.entry!r}"
                )
                failures.append((f"{name} ({found.info.distribution})", attrs.evolve(found.info, error=why)))
    used = [found for found in plugins if not found.methods or found in owners.values()]
    return Catalog(tuple(used), tuple(failures), limit)


def _discover(
    distributions: Iterable[metadata.Distribution],
) -> tuple[list[tuple[metadata.EntryPoint, MethodInfo]], list[Failure]]:
    """Return the entry points of the group, sorted by distribution, and the distributions that cannot be read.

    If two distributions have the same name, only the first one on the path counts, as for Python's imports. Another
    version is listed as a failure.
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


# --- What a plugin must be --------------------------------------------------------------------------------------------


def admit(plugin: object, entry: str, info: MethodInfo) -> Plugin:
    """Check a plugin, and collect its hooks and methods. Raises `PluginError` if it is broken."""
    api = _read_api(plugin)
    manager = pluggy.PluginManager(specs.PROJECT)  # its own: what a broken plugin leaves behind, nobody sees
    manager.add_hookspecs(specs)
    _check_hooks(manager, plugin)
    try:
        manager.register(plugin, name=entry)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a hook implementation does not match its spec: {error_text(error)}") from error
    hooks = {caller.name: caller.get_hookimpls()[-1] for caller in manager.get_hookcallers(plugin) or ()}
    return Plugin(plugin, entry, info, hooks, _ask_methods(hooks), api)


def _read_api(plugin: object) -> int:
    """The number of the contract that a plugin was written for, 1 if it says none. Raises `PluginError` for others."""
    wanted: object = getattr(plugin, API_NAME, 1)
    if type(wanted) is not int or wanted < 1:
        raise PluginError(
            f"{API_NAME} is {shown(wanted)}; expected the number of the contract, as in {API_NAME} = {API}"
        )
    if not OLDEST_API <= wanted <= API:
        older = "tunerkit" if wanted > API else "version of the plugin"
        supported = f"this tunerkit supports {OLDEST_API} to {API}"
        raise PluginError(f"it was written for {API_NAME} {wanted}, and {supported}; install a newer {older}")
    return wanted


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Raise `PluginError` if a plugin has no hooks, or if one is misspelt, not marked, a wrapper or there twice."""
    if not isinstance(plugin, Hashable):
        raise PluginError(f"a plugin must be hashable, and {type(plugin).__name__} is not")
    marked = {name: found for name in dir(plugin) if (found := manager.parse_hookimpl_opts(plugin, name)) is not None}
    unmarked = [name for name in sorted(HOOKS - marked.keys()) if isfunction(getattr_static(plugin, name, None))]
    problems = [f"{name} is not marked @tunerkit.hookimpl" for name in unmarked]
    first: dict[str, str] = {}
    for attribute, options in marked.items():
        name = options.get("specname") or attribute
        # An optional hook may belong to a newer tunerkit.
        if name not in HOOKS and not options.get("optionalhook"):
            problems.append(f"there is no hook {name!r} in this version of tunerkit{closest(name, HOOKS)}")
        if options.get("wrapper") or options.get("hookwrapper"):
            problems.append(f"{attribute} is a hook wrapper, but plugins are called one at a time: nothing to wrap")
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


def _ask_methods(hooks: Mapping[str, pluggy.HookImpl]) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    # Any: nothing has checked yet what the plugin returns.
    answer: Any = hooks["tunerkit_methods"].function() if "tunerkit_methods" in hooks else None
    for method in () if answer is None else answer:
        name = _checked_name(method)
        if name in methods:
            raise PluginError(f"tunerkit_methods yielded {name!r} twice")
        methods[name] = method
    if methods and "tunerkit_build_adapter" not in hooks:
        raise PluginError(f"it provides the method {next(iter(methods))!r} but has no tunerkit_build_adapter for it")
    calibrated = [name for name, method in methods.items() if method.statistics is not None]
    if calibrated and "tunerkit_calibrate" not in hooks:
        raise PluginError(f"its method {calibrated[0]!r} wants statistics but it has no tunerkit_calibrate")
    return methods


# Any: nothing has checked yet what the plugin yielded, or what the record contains.
def _checked_name(method: Any) -> str:
    """Return the name of a method, after all checks of its record."""
    if not isinstance(method, Method):
        raise PluginError(f"tunerkit_methods yielded {shown(method)}; expected a tunerkit.plugin.Method")
    name: object = method.name
    if not isinstance(name, str) or not re.fullmatch(r"[^\s,/()]+", name):
        raise PluginError(
            f"a method is named {shown(name)}; expected a word (a str) without spaces, commas, slashes or brackets"
        )
    # attrs.has also accepts an undecorated subclass of an attrs class, whose new fields would be ignored.
    config: object = method.config
    own = isclass(config) and issubclass(config, AdapterConfig) and config is not AdapterConfig
    if not (own and "__attrs_attrs__" in vars(config)):
        raise PluginError(
            f"the config of method {shown(name)} is {shown(config)}; "
            "expected an attrs class derived from tunerkit.plugin.AdapterConfig"
        )
    asked = method.statistics
    ranks = (asked.inputs, asked.gradients) if isinstance(asked, StatisticsRequest) else ()
    positive = any(ranks) and all(type(rank) is int and rank >= 0 for rank in ranks)
    if asked is not None and not (positive or callable(asked)):
        raise PluginError(
            f"statistics of method {shown(name)} is {shown(asked)}; expected tunerkit.plugin.StatisticsRequest "
            "with the ranks of what it wants, as in tunerkit.plugin.StatisticsRequest(inputs=16)"
        )
    if (wrong := mistyped(method, Method)) is not None:
        path, part, its_type = wrong
        raise PluginError(f"{path[1:]} of method {shown(name)} is {shown(part)}; expected {type_name(its_type)}")
    return str.__str__(name)
