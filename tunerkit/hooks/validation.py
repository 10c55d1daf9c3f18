"""Validation: checks a plugin, registers it with pluggy and collects its methods, or rejects it completely."""

import re
from collections.abc import Hashable, Mapping
from inspect import getattr_static, isclass, isfunction
from typing import Any

import attrs
import pluggy

from tunerkit.config import AdapterConfig
from tunerkit.errors import PluginError, closest, error_text, shown
from tunerkit.hooks import specs
from tunerkit.records import Method, MethodInfo, StatisticsRequest

# The version of the contract between core and plugins, and the oldest that still works; docs/plugins.md says what may
# change when.
API, OLDEST_API = 1, 1
API_NAME = "TUNERKIT_API"
HOOKS = frozenset(name for name in dir(specs) if name.startswith("tunerkit_"))


@attrs.frozen(eq=False)
class Plugin:
    """A plugin that is registered with pluggy: the object with the hooks, its origin, and its methods by name.

    ``entry`` is the name of its entry point; an in-process plugin has the name of its module or class.
    """

    plugin: object
    entry: str
    info: MethodInfo
    methods: Mapping[str, Method]

    def __str__(self) -> str:
        return f"plugin {self.entry!r} ({self.info.distribution})"


def admit(manager: pluggy.PluginManager, plugin: object, entry: str, info: MethodInfo) -> Plugin:
    """Check a plugin, register it and collect its methods. If it is broken, undo everything and raise `PluginError`."""
    _check_api(plugin)
    _check_hooks(manager, plugin)
    if manager.is_registered(plugin):
        raise PluginError(f"the plugin is already registered, as {manager.get_name(plugin)!r}")
    try:
        # The id distinguishes two in-process plugins of the same class.
        manager.register(plugin, name=f"{info.distribution}:{entry}:{id(plugin)}")
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a hook implementation does not match its spec: {error_text(error)}") from error
    try:
        return Plugin(plugin, entry, info, _ask_methods(manager, plugin))
    except BaseException:
        manager.unregister(plugin)
        raise


def _check_api(plugin: object) -> None:
    """Raise `PluginError` if a plugin was written for another version of the contract; without a number, it is 1."""
    wanted = getattr(plugin, API_NAME, 1)
    if type(wanted) is not int or wanted < 1:
        raise PluginError(
            f"{API_NAME} is {shown(wanted)}; expected the number of the contract, as in {API_NAME} = {API}"
        )
    if wanted > API:
        raise PluginError(f"it needs {API_NAME} {wanted}, and this tunerkit has {API}; install a newer tunerkit")
    if wanted < OLDEST_API:
        raise PluginError(
            f"it was written for {API_NAME} {wanted}, and this tunerkit supports {OLDEST_API} to {API}; install a "
            "newer version of the plugin"
        )


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Raise `PluginError` if a plugin has no hooks, or if one is misspelt, not marked or a hook wrapper."""
    if not isinstance(plugin, Hashable):
        raise PluginError(f"a plugin must be hashable, and {type(plugin).__name__} is not")
    marked = {name: found for name in dir(plugin) if (found := manager.parse_hookimpl_opts(plugin, name)) is not None}
    unmarked = [name for name in sorted(HOOKS - marked.keys()) if isfunction(getattr_static(plugin, name, None))]
    problems = [f"{name} is not marked @tunerkit.hookimpl" for name in unmarked]
    for attribute, options in marked.items():
        name = options.get("specname") or attribute
        # An optional hook may belong to a newer tunerkit.
        if name not in HOOKS and not options.get("optionalhook"):
            problems.append(f"there is no hook {name!r} in this version of tunerkit{closest(name, HOOKS)}")
        if options.get("wrapper") or options.get("hookwrapper"):
            problems.append(f"{attribute} is a hook wrapper, but plugins are called one at a time: nothing to wrap")
        if isclass(plugin) and isfunction(getattr_static(plugin, attribute)):
            problems.append(f"{attribute} is an instance method: pass an instance, {plugin.__name__}()")
    if problems:
        raise PluginError("; ".join(problems))
    if not marked:
        raise PluginError(
            f"{shown(plugin)} is not a plugin: it implements no hook; mark its functions @tunerkit.hookimpl"
        )


def _ask_methods(manager: pluggy.PluginManager, plugin: object) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    others = [other for other in manager.get_plugins() if other is not plugin]
    hooks = {name: manager.subset_hook_caller(name, others) for name in HOOKS}
    for answer in hooks["tunerkit_methods"]():
        for method in answer:
            name = _checked_name(method)
            if name in methods:
                raise PluginError(f"tunerkit_methods yielded {name!r} twice")
            methods[name] = method
    if methods and not hooks["tunerkit_build_adapter"].get_hookimpls():
        raise PluginError(f"it provides the method {next(iter(methods))!r} but has no tunerkit_build_adapter for it")
    calibrated = [name for name, method in methods.items() if method.statistics is not None]
    if calibrated and not hooks["tunerkit_calibrate"].get_hookimpls():
        raise PluginError(f"its method {calibrated[0]!r} wants statistics but it has no tunerkit_calibrate")
    return methods


# Any: nothing has checked yet what the plugin yielded, or what the record contains.
def _checked_name(method: Any) -> str:
    """Return the name of a method, after all checks of its record."""
    if not isinstance(method, Method):
        raise PluginError(f"tunerkit_methods yielded {shown(method)}; expected a tunerkit.records.Method")
    name: object = method.name
    config: object = method.config
    if not isinstance(name, str) or not re.fullmatch(r"[^\s,/()]+", name):
        raise PluginError(
            f"a method is named {shown(name)}; expected a word (a str) without spaces, commas, slashes or brackets"
        )
    # attrs.has also accepts an undecorated subclass of an attrs class, whose new fields would be ignored.
    own = isclass(config) and issubclass(config, AdapterConfig) and config is not AdapterConfig
    if not (own and "__attrs_attrs__" in vars(config)):
        raise PluginError(
            f"the config of method {shown(name)} is {shown(config)}; "
            "expected an attrs class derived from tunerkit.AdapterConfig"
        )
    for field, flag in (("needs_steps", method.needs_steps), ("pieces", method.pieces)):
        if not isinstance(flag, bool):
            raise PluginError(f"{field} of method {shown(name)} is {shown(flag)}; expected a bool")
    for field, allowed in (("start", ("exact", "rounding")), ("targets", ("weights", "outputs"))):
        if (value := {"start": method.start, "targets": method.targets}[field]) not in allowed:
            raise PluginError(f"{field} of method {shown(name)} is {shown(value)}; expected one of {allowed}")
    asked = method.statistics
    ranks = (asked.inputs, asked.gradients) if isinstance(asked, StatisticsRequest) else ()
    if asked is not None and not (any(ranks) and all(type(rank) is int and rank >= 0 for rank in ranks)):
        raise PluginError(
            f"statistics of method {shown(name)} is {shown(asked)}; expected tunerkit.StatisticsRequest "
            "with the ranks of what it wants, as in tunerkit.StatisticsRequest(inputs=16)"
        )
    return str.__str__(name)
