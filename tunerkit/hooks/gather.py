"""Ask every plugin: what it knows of other libraries, and whether it takes over what the user asked for.

What it says to know is left out, with a warning, if it is not what the hook declares: it must not stop the others.
"""

import inspect
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from tunerkit import extras
from tunerkit.errors import PluginError, error_text, is_of_user, shown, warn
from tunerkit.hooks import specs
from tunerkit.hooks.calls import is_json
from tunerkit.hooks.engines import Engine
from tunerkit.hooks.registry import Answer, registry
from tunerkit.hooks.tuner_view import TunerView
from tunerkit.hooks.validation import Plugin
from tunerkit.layers import CORE, BaseLayer, Knowledge
from tunerkit.patterns import is_broad
from tunerkit.records import (
    DefaultTargets,
    Format,
    Holding,
    ModelLibrary,
    NewModules,
    RankChange,
    Restriction,
    WeightReader,
)


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
        libraries=gather_libraries(),
        unserved=registry.unserved,
        leave_out=leave_out,
    )


def gather_formats() -> dict[str, Format]:
    """The formats of all plugins by name; of two with one name, the first."""
    found: dict[str, Format] = {}
    for each in _joined(_known(specs.tunerkit_formats, _is_format, _FORMATS)):
        found.setdefault(each.name, each)
    return found


def gather_libraries() -> tuple[ModelLibrary, ...]:
    """What libraries know of their models, as all plugins say it; the functions are checked, and name the plugin."""
    answers = _known(specs.tunerkit_model_libraries, _is_library, "tunerkit.ModelLibrary of functions")
    return tuple(_checked(record, answer.plugin) for answer in answers for record in answer.value)


def _checked(record: ModelLibrary, plugin: Plugin) -> ModelLibrary:
    functions = attrs.asdict(record, recurse=False)
    return ModelLibrary(**{name: partial(_called, plugin, name, call) for name, call in functions.items()})


def _called(plugin: Plugin, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        answer = function(*arguments)
    except Exception as error:
        error.add_note(f"raised in {name} of a ModelLibrary of {plugin}")
        raise
    expected, is_valid = _LIBRARY[name]
    if not is_valid(answer):
        raise PluginError(f"{name} of a ModelLibrary of {plugin} returned {shown(answer)}; it must return {expected}")
    return answer


def gather_holdings() -> tuple[Holding, ...]:
    """How libraries hold weights, as all plugins say it."""
    return tuple(_joined(_known(specs.tunerkit_holdings, _is_holding, _HOLDINGS)))


def gather_restrictions() -> tuple[Restriction, ...]:
    """What is refused with which library, as all plugins say it; then what core would do wrong without a plugin."""
    found = _joined(_known(specs.tunerkit_restrictions, _is_restriction, _RESTRICTIONS))
    for library in extras.LIBRARIES:
        distribution = extras.distribution(library.extra)
        if library.verbs and (absent := registry.absence(distribution)) is not None:
            why = f"{distribution} knows what it does, and {absent} ({extras.install(library.extra)})"
            classes = (library.package,) if library.package else ()
            marks = dict.fromkeys(library.marks)
            found.append(Restriction(library.name, dict.fromkeys(library.verbs, why), classes, marks))
    return tuple(found)


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


def reference(model: nn.Module) -> nn.Module | None:
    """Make a frozen reference of a wrapped model; None if no plugin does."""
    for answer in registry.ask(specs.tunerkit_reference, model=model):
        if not isinstance(answer.value, nn.Module):
            asked = f"tunerkit_reference of {answer.plugin}"
            raise PluginError(f"{asked} returned {shown(answer.value)}; it must return a torch.nn.Module, or None")
        return answer.value
    return None


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


def adapted(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Tell every plugin which modules of a model have adapters now."""
    for _ in registry.ask(specs.tunerkit_adapted, model=model, modules=modules):
        pass
    distribution = extras.distribution(extras.ENGINES)
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if grouped and (absent := registry.absence(distribution)) is not None and any(map(_is_trained, modules)):
        warn(
            f"this process is in a group, and {absent} ({extras.install(extras.ENGINES)}), which would notice adapters "
            "that DistributedDataParallel does not synchronise: wrap the model first, then put it into DDP"
        )


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def unwrapped(model: nn.Module) -> None:
    """Tell every plugin that a model, or a copy of a part of one, is to be without adapters."""
    for _ in registry.ask(specs.tunerkit_unwrapped, model=model):
        pass


def ranks_changed(
    tuner: TunerView, history: list[RankChange], step: int, budget: int, ranks: Mapping[str, int], watchers: Any = None
) -> None:
    """Add an allocation to the history, and notify every plugin. If one raises, a warning names it.

    A watcher is notified again next time: a logger may fail once, because the network does. ``watchers`` are those of
    `callers_of`, if they were looked up before.
    """
    change = RankChange(step, budget, dict(ranks))
    history.append(change)
    given = {"tuner": tuner, "change": change}
    found = registry.watchers(specs.tunerkit_ranks_changed) if watchers is None else watchers
    for each in sorted(found.get_hookimpls(), key=operator.attrgetter("trylast")):
        try:
            answer = each.function(*(given[name] for name in each.argnames))
            if isinstance(answer, Iterator):
                deque(answer, maxlen=0)  # a generator runs only when it is read
        except BaseException as error:  # SystemExit too: a watcher must not end a training
            if is_of_user(error):
                raise
            plugin = registry.plugin_at(each.plugin)
            warn(f"tunerkit_ranks_changed of {plugin} failed and was ignored: {error_text(error)}")


_KINDS = "classes that derive from tunerkit.BaseLayer and define all its abstract methods (and matrix(), if linear)"
_READERS = "tunerkit.WeightReader, each with a class's qualified name as owner and a tuple of its children's names"
_DEFAULTS = "tunerkit.DefaultTargets, each with a tuple of model types and a tuple of plain names"
_HOLDINGS = "tunerkit.Holding, each with three texts and functions"
_RESTRICTIONS = "tunerkit.Restriction, each with a name, texts by verb, and classes or marks to recognise it by"
# What each function of a library returns.
_LIBRARY: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "heads": ("a list of modules", lambda answer: _are(answer, nn.Module)),
    "new": ("tunerkit.NewModules, or None", lambda answer: answer is None or isinstance(answer, NewModules)),
    "settings": ("a dict that JSON can hold", lambda answer: type(answer) is dict and is_json(answer)),
    "tied_flags": ("a list of names", lambda answer: _are(answer, str)),
    "resize_hint": ("a text", lambda answer: isinstance(answer, str)),
}
_FORMATS = "tunerkit.Format, each with a name, functions for sniff, read and write, and an attrs class as options"


def _known(hook: Callable[[], object], is_valid: Callable[[object], bool], expected: str) -> tuple[Answer, ...]:
    """The plugins' answers to ``hook``, without those that are not as expected. The same plugins are asked once."""
    return registry.kept(hook, partial(_asked, hook, is_valid, expected))


def _asked(hook: Callable[[], object], is_valid: Callable[[object], bool], expected: str) -> tuple[Answer, ...]:
    found = []
    for answer in registry.gather(hook):
        fault = f"it returned {shown(answer.value)}; it must return a list of {expected}"
        try:
            if isinstance(answer.value, tuple | list) and all(map(is_valid, answer.value)):
                found.append(attrs.evolve(answer, value=tuple(answer.value)))
                continue
        except Exception as error:  # a plugin's metaclass or property may raise anything
            fault = f"checking its answer raised {error_text(error)}"
        registry.leave_out(answer.plugin, hook, fault)
    return tuple(found)


# Any: each answer was checked to be what the hook's spec declares.
def _joined(answers: Iterable[Answer]) -> list[Any]:
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


def _is_holding(record: Any) -> bool:
    if not isinstance(record, Holding):
        return False
    texts, functions = (record.name, record.way_out, record.one_dtype), attrs.astuple(record, recurse=False)[3:]
    return all(isinstance(text, str) for text in texts) and all(map(callable, functions))


def _is_restriction(record: Any) -> bool:
    if not isinstance(record, Restriction) or not (record.classes or record.marks):
        return False
    texts = (record.name, *record.refused, *record.refused.values(), *record.marks)
    return _are_names(record.classes) and all(isinstance(text, str) for text in texts)


def _is_library(record: Any) -> bool:
    return isinstance(record, ModelLibrary) and all(map(callable, attrs.astuple(record, recurse=False)))


def _are(answer: object, kind: type) -> bool:
    return isinstance(answer, list | tuple) and all(isinstance(each, kind) for each in answer)


def _are_names(names: object) -> bool:
    return isinstance(names, tuple) and all(isinstance(name, str) and name and not is_broad(name) for name in names)
