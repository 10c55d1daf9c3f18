"""Gather what core and all plugins know of other libraries: base-layer kinds, weight readers, default targets."""

import inspect
from collections.abc import Callable
from typing import Any

from tunerkit.errors import PluginError
from tunerkit.hooks import specs
from tunerkit.hooks.registry import registry
from tunerkit.layers import CORE, BaseLayer, Knowledge
from tunerkit.patterns import is_broad
from tunerkit.records import DefaultTargets, WeightReader


def gather_knowledge() -> Knowledge:
    """Core's records first, then every plugin's, so that a plugin cannot replace what core knows."""
    return Knowledge(
        kinds=(*CORE.kinds, *_ask(specs.tunerkit_base_layers, _is_kind, _KINDS)),
        weight_readers=(*CORE.weight_readers, *_ask(specs.tunerkit_weight_readers, _is_reader, _READERS)),
        default_targets=(*CORE.default_targets, *_ask(specs.tunerkit_default_targets, _is_default, _DEFAULTS)),
    )


_KINDS = "classes that derive from tunerkit.BaseLayer and define all its abstract methods (and matrix(), if linear)"
_READERS = "tunerkit.WeightReader, each with a class's qualified name as owner and a tuple of its children's names"
_DEFAULTS = "tunerkit.DefaultTargets, each with a tuple of model types and a tuple of plain names"


# Any: each answer is checked to be what the hook's spec declares.
def _ask(hook: Callable[[], object], is_valid: Callable[[object], bool], expected: str) -> list[Any]:
    """The plugins' answers to ``hook``. Raises `PluginError` naming the plugin if an answer is not as expected."""
    found: list[Any] = []
    for answer in registry.call_all(hook):
        if not isinstance(answer.value, tuple | list) or not all(map(is_valid, answer.value)):
            raise PluginError(
                f"{answer.plugin} returned {answer.value!r}; {hook.__name__} must return a list of {expected}"
            )
        found += answer.value
    return found


def _is_kind(kind: object) -> bool:
    if not isinstance(kind, type) or not issubclass(kind, BaseLayer) or inspect.isabstract(kind):
        return False
    return not kind.linear or kind.matrix is not BaseLayer.matrix


# Any: attrs does not check the types of a record's fields.
def _is_reader(record: Any) -> bool:
    return isinstance(record, WeightReader) and _are_names((record.owner,)) and _are_names(record.children)


def _is_default(record: object) -> bool:
    return isinstance(record, DefaultTargets) and _are_names(record.model_types) and _are_names(record.names)


def _are_names(names: object) -> bool:
    return isinstance(names, tuple) and all(isinstance(name, str) and name and not is_broad(name) for name in names)
