"""The base-layer kinds of core and of every plugin."""

import inspect

from tunerkit.errors import PluginError
from tunerkit.hooks import specs
from tunerkit.hooks.registry import registry
from tunerkit.layers import KINDS, BaseLayer


def all_kinds() -> tuple[type[BaseLayer], ...]:
    """Core's strict base-layer kinds, then those of every plugin: nobody can take over a plain layer."""
    found: list[type[BaseLayer]] = []
    for answer in registry.call_all(specs.tunerkit_base_layers):
        offered = answer.value
        if not isinstance(offered, tuple | list) or not all(map(_is_kind, offered)):
            raise PluginError(
                f"{answer.plugin} offered {offered!r} as base-layer kinds; tunerkit_base_layers must return a list of "
                "classes that derive from tunerkit.BaseLayer and define all it asks for"
            )
        found += offered
    return (*KINDS, *found)


def _is_kind(kind: object) -> bool:
    if not isinstance(kind, type) or not issubclass(kind, BaseLayer) or inspect.isabstract(kind):
        return False
    return not kind.linear or kind.matrix is not BaseLayer.matrix
