"""Admission: a plugin is checked, registered with pluggy and asked for its methods, or refused without a trace."""

import re
from collections.abc import Iterator
from inspect import getattr_static, isclass, isfunction
from typing import Any

import attrs
import pluggy

from tunerkit.config import AdapterConfig
from tunerkit.errors import PluginError, closest
from tunerkit.hooks.discovery import Source, error_text
from tunerkit.records import Method


@attrs.frozen(eq=False)
class Plugin:
    """A plugin that is registered with pluggy, and the methods it yields."""

    plugin: object
    source: Source
    methods: tuple[Method, ...]


def admit(manager: pluggy.PluginManager, plugin: object, source: Source) -> Plugin:
    """Check a plugin, register it and ask for its methods; raise `PluginError` and leave nothing if it is broken."""
    names = _check_hooks(manager, plugin)
    if manager.is_registered(plugin):
        raise PluginError(f"the plugin is already registered, as {manager.get_name(plugin)!r}")
    try:
        # An object's id makes two in-process plugins of one class different.
        manager.register(plugin, name=f"{source.distribution}:{source.entry}:{id(plugin)}")
    except pluggy.PluginValidationError as error:
        raise PluginError(f"it doesn't fit its hook: {error_text(error)}") from error
    try:
        return Plugin(plugin, source, _ask_methods(manager, plugin, builds="tunerkit_build_adapter" in names))
    except BaseException:
        manager.unregister(plugin)
        raise


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> set[str]:
    """The hooks a plugin implements; `PluginError` if that is none, or if one is misspelt, unmarked or a wrapper."""
    specs = set(vars(manager.hook))
    names, problems = set(), []
    try:
        hash(plugin)
    except TypeError:
        raise PluginError(f"a plugin must be hashable, and {type(plugin).__name__} is not") from None
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            if attribute in specs and isfunction(getattr_static(plugin, attribute)):
                problems.append(f"{attribute} is not marked @tunerkit.hookimpl")
            continue
        name = options.get("specname") or attribute
        names.add(name)
        problems.extend(_hook_problems(plugin, attribute, name, specs, options=options))
    if problems:
        raise PluginError("; ".join(problems))
    if not names:
        raise PluginError(f"{plugin!r} is not a plugin: it implements no hook; mark its functions @tunerkit.hookimpl")
    return names


def _hook_problems(
    plugin: object, attribute: str, name: str, specs: set[str], *, options: pluggy.HookimplOpts
) -> Iterator[str]:
    # An optional hook may be one of a newer tunerkit.
    if name not in specs and not options.get("optionalhook"):
        yield f"there is no hook {name!r}{closest(name, specs)}"
    if options.get("wrapper") or options.get("hookwrapper"):
        yield f"{attribute} is a hook wrapper, and plugins are called one by one: there is nothing to wrap"
    if isclass(plugin) and isfunction(getattr_static(plugin, attribute)):
        yield f"{attribute} is an instance's method: pass an instance, {plugin.__name__}()"


def _ask_methods(manager: pluggy.PluginManager, plugin: object, *, builds: bool) -> tuple[Method, ...]:
    answers = heard_by(manager, "tunerkit_methods", plugin)()
    methods: list[Method] = []
    for answer in answers:
        for method in answer:
            _check_method(method, {known.name for known in methods})
            methods.append(method)
    if methods and not builds:
        raise PluginError(f"it yields the method {methods[0].name!r} and has no tunerkit_build_adapter for it")
    return tuple(methods)


# Any: a plugin may yield whatever it likes, and a record holds whatever it was given.
def _check_method(method: Any, known: set[str]) -> None:
    if not isinstance(method, Method):
        raise PluginError(f"tunerkit_methods yielded {method!r}; expected a tunerkit.records.Method")
    if not re.fullmatch(r"[^\s,/()]+", str(method.name)):
        raise PluginError(
            f"a method is named {method.name!r}; expected a word without blanks, commas, slashes or brackets"
        )
    if not _is_config(method.config):
        raise PluginError(
            f"the config of method {method.name!r} is {method.config!r}; "
            "expected an attrs class derived from tunerkit.AdapterConfig"
        )
    if method.name in known:
        raise PluginError(f"tunerkit_methods yielded {method.name!r} twice")


def _is_config(found: object) -> bool:
    # attrs.has would take a class for one that merely derives from one: its own fields would be no settings.
    return isclass(found) and issubclass(found, AdapterConfig) and "__attrs_attrs__" in vars(found)


def find_hook(manager: pluggy.PluginManager, name: str) -> pluggy.HookCaller:
    """The hook of that name, or `PluginError` with the closest names."""
    found: pluggy.HookCaller | None = getattr(manager.hook, name, None)
    if found is None:
        raise PluginError(f"there is no hook {name!r}{closest(name, vars(manager.hook))}")
    return found


def heard_by(manager: pluggy.PluginManager, name: str, plugin: object) -> pluggy.HookCaller:
    """The hook as only ``plugin`` hears it."""
    find_hook(manager, name)
    return manager.subset_hook_caller(name, [other for other in manager.get_plugins() if other is not plugin])
