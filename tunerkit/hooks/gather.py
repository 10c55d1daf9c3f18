"""Ask every plugin: what it knows of other libraries, and whether it takes over what the user asked for.

What it says to know is left out, with a warning, if it is not what the hook declares: it must not stop the others.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from tunerkit.engine import Engine
from tunerkit.errors import PluginError, error_text, shown
from tunerkit.hooks import specs
from tunerkit.hooks.registry import Answer, registry
from tunerkit.hooks.tuner_view import TunerView
from tunerkit.layers import CORE, BaseLayer, Knowledge
from tunerkit.patterns import is_broad
from tunerkit.records import DefaultTargets, Format, RankChange, Sharding, WeightReader


def gather_knowledge() -> Knowledge:
    """Core's records first, then every plugin's, so that a plugin cannot replace what core knows."""
    kinds = _known(specs.tunerkit_base_layers, _is_kind, _KINDS)
    readers = _known(specs.tunerkit_weight_readers, _is_reader, _READERS)
    defaults = _known(specs.tunerkit_default_targets, _is_default, _DEFAULTS)

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
    for each in _joined(_known(specs.tunerkit_formats, _is_format, _FORMATS)):
        found.setdefault(each.name, each)
    return found


def gather_shardings() -> tuple[Sharding, ...]:
    """How engines cut weights, as all plugins say it."""
    return tuple(_joined(_known(specs.tunerkit_shardings, _is_sharding, "tunerkit.Sharding, each with four functions")))


def attached_by_plugin(
    tuners: Sequence[TunerView], candidate: object, total_steps: int | None, data_parallel: bool | None
) -> bool:
    """Let plugins attach adapters to a trainer that they know. Returns whether one did."""
    answers = registry.ask(
        specs.tunerkit_attach,
        tuners=tuners,
        candidate=candidate,
        total_steps=total_steps,
        data_parallel=data_parallel,
    )
    return any(answer.value for answer in answers)


def engine(
    tuners: Sequence[TunerView], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object] | None:
    """What the processes of a training do together, and what takes the step hooks; None if no plugin says."""
    asked: dict[str, Any] = {"tuners": tuners, "model": model, "candidate": candidate, "data_parallel": data_parallel}
    what = "an engine and what takes the step hooks"
    found: tuple[Engine, object] | None = _first_pair(specs.tunerkit_engine, what, "before_step_", asked)
    return found


def open_run(path: Path, base: str | None) -> tuple[nn.Module, object] | None:
    """Load the model and the processor of a run's folder; None if no plugin knows it."""
    what, asked = "a model and its processor", {"path": path, "base": base}
    found: tuple[nn.Module, object] | None = _first_pair(specs.tunerkit_open_run, what, "named_modules", asked)
    return found


# Any: a pair is recognised by an attribute of its first part, as a plugin's engine need not derive from ours.
def _first_pair(hook: Callable[..., object], what: str, attribute: str, arguments: dict[str, Any]) -> Any:
    for answer in registry.ask(hook, **arguments):
        pair = answer.value
        if not (isinstance(pair, tuple) and len(pair) == 2 and hasattr(pair[0], attribute)):
            asked = f"{hook.__name__} of {answer.plugin}"
            raise PluginError(f"{asked} returned {shown(pair)}; it must return {what}, or None")
        return pair
    return None


def wrapped(model: nn.Module) -> None:
    """Tell every plugin that a model has its first adapter."""
    for _ in registry.ask(specs.tunerkit_wrapped, model=model):
        pass


def unwrapped(model: nn.Module) -> None:
    """Tell every plugin that a model, or a copy of a part of one, is to be without adapters."""
    for _ in registry.ask(specs.tunerkit_unwrapped, model=model):
        pass


def ranks_changed(tuner: TunerView, change: RankChange) -> None:
    """Notify every plugin of an allocation."""
    registry.notify(specs.tunerkit_ranks_changed, tuner=tuner, change=change)


_KINDS = "classes that derive from tunerkit.BaseLayer and define all its abstract methods (and matrix(), if linear)"
_READERS = "tunerkit.WeightReader, each with a class's qualified name as owner and a tuple of its children's names"
_DEFAULTS = "tunerkit.DefaultTargets, each with a tuple of model types and a tuple of plain names"
_FORMATS = "tunerkit.Format, each with a name, functions for sniff, read and write, and an attrs class as options"


def _known(hook: Callable[[], object], is_valid: Callable[[object], bool], expected: str) -> list[Answer]:
    """The plugins' answers to ``hook``, without those that are not as expected."""
    found = []
    for answer in registry.gather(hook):
        fault = f"it returned {shown(answer.value)}; it must return a list of {expected}"
        try:
            if isinstance(answer.value, tuple | list) and all(map(is_valid, answer.value)):
                found.append(answer)
                continue
        except Exception as error:  # a plugin's metaclass or property may raise anything
            fault = f"checking its answer raised {error_text(error)}"
        registry.leave_out(answer.plugin, hook, fault)
    return found


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
