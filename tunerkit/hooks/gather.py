"""Ask every plugin: what it knows of other libraries, and whether it takes over what the user asked for.

What it says to know is left out, with a warning, if it is not what the hook declares: it must not stop the others.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar, get_args

import attrs
from torch import nn

from tunerkit import extras
from tunerkit.config import AdapterConfig
from tunerkit.errors import ConfigError, PluginError, TunerkitError, error_text, is_of_user, shown, warn
from tunerkit.hooks import specs
from tunerkit.hooks.calls import declared, is_json, structure, unlike
from tunerkit.hooks.engines import TunerView, in_group
from tunerkit.hooks.loading import Plugin
from tunerkit.hooks.registry import registry
from tunerkit.layers import CORE, BaseLayer, Knowledge, torch_private
from tunerkit.patterns import is_broad
from tunerkit.records import Format, Holding, ModelLibrary, RankChange, Restriction, type_name

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Exception)


def first(hook: Callable[P, R], /, *args: P.args, **arguments: P.kwargs) -> R | None:
    """Ask one plugin after another until one answers; None if none does. Raises `PluginError` for a wrong answer."""
    for plugin, answer in registry.ask(hook, *args, **arguments):
        _refuse(plugin, hook.__name__, unlike(answer, declared(hook)))
        if answer is not None and answer is not False:
            found: R = answer
            return found
    return None


def _refuse(plugin: Plugin, what: str, wrong: tuple[str, str] | None) -> None:
    if wrong is not None:
        raise PluginError(f"{what} of {plugin} returned {wrong[0]}; it must return {wrong[1]}; {plugin.way_out}")


def tell(hook: Callable[P, None], /, *args: P.args, **arguments: P.kwargs) -> None:
    """Let every plugin do what belongs to a moment."""
    deque(registry.ask(hook, *args, **arguments), maxlen=0)


def gather_knowledge() -> Knowledge:
    """Core's records first, then every plugin's, so that a plugin cannot replace what core knows."""
    kinds = _known(specs.tunerkit_base_layers)

    def leave_out(kind: type[BaseLayer], error: BaseException) -> None:
        for plugin, known in kinds:
            if known is kind:
                reason = f"{kind.__name__} cannot say whether it matches a module: {error_text(error)}"
                registry.leave_out(plugin, specs.tunerkit_base_layers, reason)

    return Knowledge(
        kinds=(*CORE.kinds, *(kind for _, kind in kinds)),
        weight_readers=(*CORE.weight_readers, *_records(specs.tunerkit_weight_readers)),
        default_targets=(*CORE.default_targets, *_records(specs.tunerkit_default_targets)),
        libraries=gather_libraries(),
        unserved=registry.unserved,
        leave_out=leave_out,
    )


def gather_formats() -> dict[str, Format]:
    """The formats of all plugins by name; of two with one name, the first."""
    found: dict[str, Format] = {}
    for each in _records(specs.tunerkit_formats):
        found.setdefault(each.name, each)
    return found


@contextmanager
def naming(format: Format, function: str) -> Iterator[None]:
    """Errors of a plugin's function keep their class and name the format."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by {function} of format {format.name!r}")
        if not isinstance(error, TunerkitError):  # whose message says what to do
            because_of(format, specs.tunerkit_formats, error)
        raise


def configure(method: str, config: object, model: nn.Module) -> AdapterConfig:
    """Convert what the user passed as config to the method's config class.

    It is an object of that class, a mapping, None, or an object of another program, which that format's plugin reads.
    """
    if config is None or isinstance(config, Mapping):
        return structure(method, config or {})
    expected, got = registry.get(method).config, type(config)
    if isinstance(config, AdapterConfig) and isinstance(config, expected):
        return config
    for each in gather_formats().values():
        with naming(each, "config"):
            if (found := each.config(config, model)) is None:
                continue
            if found[0] == method:
                return structure(*found)
            wanted = f"describes method {found[0]!r}, got {method!r}; write wrap(model, {found[0]!r}, config)"
            raise ConfigError([f"this {got.__name__} {wanted} @ $"])
    # Another library may have a class of the same name.
    which = f" of {got.__module__}, not of {expected.__module__}" if got.__name__ == expected.__name__ else ""
    which += f"; {unserved}" if (unserved := registry.unserved(config)) else ""
    takes = f"method {method!r} takes {expected.__name__}, a mapping or None"
    raise ConfigError([f"{takes}, got {got.__name__}{which} @ $"])


def because_of(record: R | None, hook: Callable[[], Iterable[R]], error: E) -> E:
    """Return an error with a note that names the plugin whose ``record``, returned from ``hook``, is its reason."""
    for plugin, known in _known(hook):
        if known is record:
            error.add_note(f"because of {hook.__name__} of {plugin}; {plugin.way_out}")
    return error


def gather_restrictions() -> tuple[Restriction, ...]:
    """What is refused with which library, as all plugins say it; then what core would do wrong without a plugin."""
    found = [*_records(specs.tunerkit_restrictions)]
    for library in extras.LIBRARIES:
        if library.verbs and (why := registry.lacking("knows what it does", library.extra)) is not None:
            classes = (library.package,) if library.package else ()
            marks = dict.fromkeys(library.marks)
            found.append(Restriction(library.name, dict.fromkeys(library.verbs, why), classes, marks))
    return tuple(found)


def wrapped(model: nn.Module) -> None:
    """Let every plugin prepare a model. Raises `PluginError` if one changes its weights."""
    before = torch_private.versions(model)
    for plugin, _ in registry.ask(specs.tunerkit_wrapped, model=model):
        now = torch_private.versions(model)
        if any(now.get(name) != version for name, version in before.items()):
            what = "changed weights of the base, which must be loaded again"
            raise PluginError(f"tunerkit_wrapped of {plugin} {what}; {plugin.way_out}")


def adapted(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Tell every plugin which modules of a model have adapters now."""
    tell(specs.tunerkit_adapted, model=model, modules=modules)
    trained = (parameter.requires_grad for module in modules for parameter in module.parameters())
    notices = "notices adapters that DistributedDataParallel does not synchronise"
    if in_group() and any(trained) and (lacking := registry.lacking(notices)) is not None:
        warn(f"this process is in a group. {lacking}. Wrap the model first, then put it into DDP")


def ranks_changed(
    tuner: TunerView, history: list[RankChange], step: int, budget: int, ranks: Mapping[str, int]
) -> None:
    """Add an allocation to the history, and notify every plugin. If one raises, a warning names it.

    A watcher is notified again next time: a logger may fail once, because the network does.
    """
    change = RankChange(step, budget, dict(ranks))
    history.append(change)
    catalog = registry.catalog  # nothing to look up in a step, and a plugin that came after `attach` is there too
    for plugin in () if catalog is None else catalog.hooks["tunerkit_ranks_changed"]:
        try:
            plugin.call("tunerkit_ranks_changed", tuner=tuner, change=change)
        except BaseException as error:  # SystemExit too: a watcher must not end a training
            if is_of_user(error):
                raise
            warn(f"tunerkit_ranks_changed of {plugin} failed and was ignored: {error_text(error)}")


# --- What plugins say to know -----------------------------------------------------------------------------------------


def _has_matches(kind: type[BaseLayer]) -> bool:
    return inspect.getattr_static(kind, "matches") is not vars(BaseLayer)["matches"]


def _is_complete(kind: type[BaseLayer]) -> bool:
    # Without both it would match no module, in silence; a text without a comma is no tuple.
    named = bool(kind.forwards or _has_matches(kind)) and type(kind.forwards) is tuple
    return named and not inspect.isabstract(kind) and (not kind.linear or kind.matrix is not BaseLayer.matrix)


def _are_plain(*names: str) -> bool:
    return all(name and not is_broad(name) for name in names)


def _called(plugin: Plugin, what: str, declared: Any, function: Callable[..., Any], *given: Any) -> Any:
    with plugin.naming(what):
        answer = function(*given)
    wrong = unlike(answer, declared)
    if what.startswith("settings ") and not is_json(answer):
        wrong = shown(answer), "a dict that JSON can hold"
    _refuse(plugin, what, wrong)
    return answer


def _checked(plugin: Plugin, record: Any) -> Any:
    """What is said of a library, with functions that name the plugin in what they raise, and if the answer is wrong."""
    if not isinstance(record, Holding | ModelLibrary):
        return record
    kind: Any = type(record)
    values = attrs.asdict(record, recurse=False)
    for name, value in values.items():
        if callable(value):
            its = get_args(attrs.fields_dict(kind)[name].type)[-1]
            values[name] = partial(_called, plugin, f"{name} of a {kind.__name__}", its, value)
    return kind(**values)


# What each record must be beyond the types of its fields.
_RULES: Final[Mapping[Callable[..., object], tuple[str, Callable[[Any], bool]]]] = {
    specs.tunerkit_base_layers: ("with a tuple forwards or matches(), all methods, matrix() if linear", _is_complete),
    specs.tunerkit_weight_readers: ("with plain names", lambda record: _are_plain(record.owner, *record.children)),
    specs.tunerkit_default_targets: ("with plain names", lambda record: _are_plain(*record.model_types, *record.names)),
    specs.tunerkit_restrictions: (
        "with plain names of classes, or marks, to recognise it by",
        lambda record: bool(record.classes or record.marks) and _are_plain(*record.classes),
    ),
    specs.tunerkit_formats: (
        "with a plain name, and an attrs class as options",
        lambda record: _are_plain(record.name) and attrs.has(record.options),
    ),
}
# What each record serves that only the first plugin can.
_SERVED: Final[Mapping[Callable[..., object], Callable[[Any], Iterable[str]]]] = {
    specs.tunerkit_base_layers: lambda kind: () if _has_matches(kind) else kind.forwards,
    specs.tunerkit_weight_readers: lambda record: (record.owner,),
    specs.tunerkit_default_targets: lambda record: record.model_types,
    specs.tunerkit_formats: lambda record: (record.name,),
}


def _records(hook: Callable[[], Iterable[R]]) -> tuple[R, ...]:
    return tuple(record for _, record in _known(hook))


def _known(hook: Callable[[], Iterable[R]]) -> tuple[tuple[Plugin, R], ...]:
    """The records that plugins return from ``hook``, each with its plugin. The same plugins are asked once."""
    known = registry.loaded().known  # before they are asked: they may bring other plugins
    if hook not in known:
        known[hook] = _asked(hook)
    found: tuple[tuple[Plugin, R], ...] = known[hook]
    return found


def _asked(hook: Callable[[], Iterable[R]]) -> tuple[tuple[Plugin, R], ...]:
    """Ask the plugins what they know. One that raises, or whose answer is not as it must be, is left out."""
    found: list[tuple[Plugin, R]] = []
    rule, is_met = _RULES.get(hook, ("", lambda record: True))
    for plugin in registry.loaded().asked(hook):
        try:
            if (answer := plugin.call(hook.__name__)) is None:
                continue
            wrong = unlike(answer, declared(hook))
            if wrong is None and not all(map(is_met, answer)):
                wrong = shown(answer), f"{type_name(declared(hook))}, each {rule}"
            fault = wrong and f"it returned {wrong[0]}; it must return {wrong[1]}"
        except BaseException as error:  # a plugin's metaclass or property may raise anything too
            if is_of_user(error):
                raise
            fault = error_text(error)
        if fault:
            registry.leave_out(plugin, hook, fault)
        else:
            found += [(plugin, _checked(plugin, record)) for record in answer]
    firsts: dict[str, Plugin] = {}
    served = _SERVED.get(hook, lambda record: ())
    for plugin, record in found:
        for name in served(record):
            if (first := firsts.setdefault(name, plugin)) is not plugin:
                warn(f"{hook.__name__} of {plugin} is not used for {name!r}: {first} comes first; {first.way_out}")
    return tuple(found)


# How libraries hold weights, and what they know of their models, as all plugins say it.
gather_holdings = partial(_records, specs.tunerkit_holdings)
gather_libraries = partial(_records, specs.tunerkit_model_libraries)
