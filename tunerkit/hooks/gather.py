"""Gather what core and all plugins know of other libraries: base layers, weight readers, default targets, formats.

An answer that is not what its hook declares is left out, with a warning: it must not stop the other plugins.
"""

import inspect
from collections.abc import Callable
from typing import Any

import attrs

from tunerkit.errors import shown
from tunerkit.hooks import specs
from tunerkit.hooks.discovery import error_text
from tunerkit.hooks.registry import Answer, registry
from tunerkit.layers import CORE, BaseLayer, Knowledge
from tunerkit.patterns import is_broad
from tunerkit.records import DefaultTargets, Format, Sharding, WeightReader


def gather_knowledge() -> Knowledge:
    """Core's records first, then every plugin's, so that a plugin cannot replace what core knows."""
    kinds = _ask(specs.tunerkit_base_layers, _is_kind, _KINDS)
    readers = _ask(specs.tunerkit_weight_readers, _is_reader, _READERS)
    defaults = _ask(specs.tunerkit_default_targets, _is_default, _DEFAULTS)

    def leave_out(kind: type[BaseLayer], error: BaseException) -> None:
        for answer in kinds:
            if kind in answer.value:
                reason = f"{kind.__name__} cannot say whether it matches a module: {error_text(error)}"
                registry.leave_out(answer.plugin, specs.tunerkit_base_layers, reason)

    return Knowledge(
        kinds=(*CORE.kinds, *_joined(kinds)),
        weight_readers=(*CORE.weight_readers, *_joined(readers)),
        default_targets=(*CORE.default_targets, *_joined(defaults)),
        leave_out=leave_out,
    )


def gather_formats() -> dict[str, Format]:
    """The formats of all plugins by name; of two with one name, the first."""
    found: dict[str, Format] = {}
    for each in _joined(_ask(specs.tunerkit_formats, _is_format, _FORMATS)):
        found.setdefault(each.name, each)
    return found


def gather_shardings() -> tuple[Sharding, ...]:
    """How engines cut weights, as all plugins say it."""
    return tuple(_joined(_ask(specs.tunerkit_shardings, _is_sharding, "tunerkit.Sharding, each with four functions")))


_KINDS = "classes that derive from tunerkit.BaseLayer and define all its abstract methods (and matrix(), if linear)"
_READERS = "tunerkit.WeightReader, each with a class's qualified name as owner and a tuple of its children's names"
_DEFAULTS = "tunerkit.DefaultTargets, each with a tuple of model types and a tuple of plain names"

_FORMATS = "tunerkit.Format, each with a name, functions for sniff, read and write, and an attrs class as options"


def _ask(hook: Callable[[], object], is_valid: Callable[[object], bool], expected: str) -> list[Answer]:
    """The plugins' answers to ``hook``, without those that are not as expected."""
    answers = registry.call_all(hook)
    faults = {id(answer): fault for answer in answers if (fault := _fault(answer.value, is_valid, expected))}
    for answer in answers:
        if fault := faults.get(id(answer)):
            registry.leave_out(answer.plugin, hook, fault)
    return [answer for answer in answers if id(answer) not in faults]


def _fault(value: object, is_valid: Callable[[object], bool], expected: str) -> str | None:
    try:
        if isinstance(value, tuple | list) and all(map(is_valid, value)):
            return None
    except Exception as error:  # a plugin's metaclass or property may raise anything
        return f"checking its answer raised {error_text(error)}"
    return f"it returned {shown(value)}; it must return a list of {expected}"


# Any: each answer was checked to be what the hook's spec declares.
def _joined(answers: list[Answer]) -> list[Any]:
    return [record for answer in answers for record in answer.value]


def _is_kind(kind: object) -> bool:
    if not isinstance(kind, type) or not issubclass(kind, BaseLayer) or inspect.isabstract(kind):
        return False
    return not kind.linear or kind.matrix is not BaseLayer.matrix


# Any: attrs does not check the types of a record's fields.
def _is_reader(record: Any) -> bool:
    return isinstance(record, WeightReader) and _are_names((record.owner,)) and _are_names(record.children)


def _is_default(record: object) -> bool:
    return isinstance(record, DefaultTargets) and _are_names(record.model_types) and _are_names(record.names)


def _is_format(record: Any) -> bool:
    if not isinstance(record, Format) or not _are_names((record.name,)):
        return False
    functions = (record.sniff, record.read, record.write, *(() if record.describe is None else (record.describe,)))
    return attrs.has(record.options) and all(map(callable, functions))


def _is_sharding(record: Any) -> bool:
    return isinstance(record, Sharding) and all(map(callable, attrs.astuple(record, recurse=False)))


def _are_names(names: object) -> bool:
    return isinstance(names, tuple) and all(isinstance(name, str) and name and not is_broad(name) for name in names)
