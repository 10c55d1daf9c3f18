"""Validation: checks a plugin, registers it with pluggy and collects its methods, or rejects it completely."""

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
    """A plugin that is registered with pluggy, and its methods."""

    plugin: object
    source: Source
    methods: tuple[Method, ...]


def admit(manager: pluggy.PluginManager, plugin: object, source: Source) -> Plugin:
    """Check a plugin, register it and collect its methods. If it is broken, undo everything and raise `PluginError`."""
    names = _check_hooks(manager, plugin)
    if manager.is_registered(plugin):
        raise PluginError(f"the plugin is already registered, as {manager.get_name(plugin)!r}")
    try:
        # The id distinguishes two in-process plugins of the same class.
        manager.register(plugin, name=f"{source.distribution}:{source.entry}:{id(plugin)}")
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a hook implementation does not match its spec: {error_text(error)}") from error
    try:
        return Plugin(plugin, source, _ask_methods(manager, plugin, builds="tunerkit_build_adapter" in names))
    except BaseException:
        manager.unregister(plugin)
        raise


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> set[str]:
    """Return the names of the hooks that a plugin implements.

    Raises `PluginError` if there are none, or if one is misspelt, not marked or a hook wrapper.
    """
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
    # An optional hook may belong to a newer tunerkit.
    if name not in specs and not options.get("optionalhook"):
        yield f"there is no hook {name!r}{closest(name, specs)}"
    if options.get("wrapper") or options.get("hookwrapper"):
        yield f"{attribute} is a hook wrapper; plugins are called one at a time, so there is nothing to wrap"
    if isclass(plugin) and isfunction(getattr_static(plugin, attribute)):
        yield f"{attribute} is an instance method: pass an instance, {plugin.__name__}()"


def _ask_methods(manager: pluggy.PluginManager, plugin: object, *, builds: bool) -> tuple[Method, ...]:
    answers = heard_by(manager, "tunerkit_methods", plugin)()
    methods: list[Method] = []
    for answer in answers:
        for method in answer:
            _check_method(method, {known.name for known in methods})
            methods.append(method)
    if methods and not builds:
        raise PluginError(f"it provides the method {methods[0].name!r} but has no tunerkit_build_adapter for it")
    return tuple(methods)


# Any: nothing has checked yet what the plugin yielded, or what the record contains.
def _check_method(method: Any, known: set[str]) -> None:
    if not isinstance(method, Method):
        raise PluginError(f"tunerkit_methods yielded {method!r}; expected a tunerkit.records.Method")
    if not re.fullmatch(r"[^\s,/()]+", str(method.name)):
        raise PluginError(
            f"a method is named {method.name!r}; expected a word without spaces, commas, slashes or brackets"
        )
    if not _is_config(method.config):
        raise PluginError(
            f"the config of method {method.name!r} is {method.config!r}; "
            "expected an attrs class derived from tunerkit.AdapterConfig"
        )
    if method.name in known:
        raise PluginError(f"tunerkit_methods yielded {method.name!r} twice")


def _is_config(found: object) -> bool:
    # attrs.has also accepts an undecorated subclass of an attrs class, whose new fields would be ignored.
    return isclass(found) and issubclass(found, AdapterConfig) and "__attrs_attrs__" in vars(found)


def find_hook(manager: pluggy.PluginManager, name: str) -> pluggy.HookCaller:
    """Return the hook with this name. Raises `PluginError` with the closest names."""
    found: pluggy.HookCaller | None = getattr(manager.hook, name, None)
    if found is None:
        raise PluginError(f"there is no hook {name!r}{closest(name, vars(manager.hook))}")
    return found


def heard_by(manager: pluggy.PluginManager, name: str, plugin: object) -> pluggy.HookCaller:
    """Return a caller of the hook that reaches only ``plugin``."""
    find_hook(manager, name)
    return manager.subset_hook_caller(name, [other for other in manager.get_plugins() if other is not plugin])
