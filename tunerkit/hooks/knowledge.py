"""Call a hook of every plugin: collect records about other libraries, and find the plugin for a user's object.

Invalid records are left out, with a warning, so that one plugin does not stop the others.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar, get_args
from weakref import WeakKeyDictionary

import attrs
from torch import nn

from tunerkit import extras
from tunerkit.config import AdapterConfig
from tunerkit.errors import ConfigError, PluginError, TunerkitError, error_text, shown, warn
from tunerkit.hooks import specs
from tunerkit.hooks.answers import declared, is_json, structure
from tunerkit.hooks.engines import TunerView
from tunerkit.hooks.loading import Asking, Catalog, Isolated, Plugin
from tunerkit.hooks.registry import registry
from tunerkit.layers import CORE, BaseLayer, Knowledge, is_named, torch_private, weights
from tunerkit.records import Format, Holding, ModelLibrary, RankChange, Restriction, Unfit, conform, type_name

P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound=Exception)


def first(hook: Callable[P, R], /, *args: P.args, **given: P.kwargs) -> R | None:
    """Return the first plugin's answer that is not None or False, else None. Raises `PluginError` if it is invalid."""
    for plugin, answer in registry.ask(hook, *args, **given):
        if answer is None:
            continue
        with Asking(hook.__name__, plugin):
            found: R = conform(answer, declared(hook))
        if found is not False:
            return found
    return None


def tell(hook: Callable[P, None], /, *args: P.args, **given: P.kwargs) -> None:
    """Call a hook of every plugin; the answers are ignored."""
    for _ in registry.ask(hook, *args, **given):
        pass


def per_catalog(make: Callable[[], R]) -> Callable[[], R]:
    """Decorate a function without arguments: its result is cached until plugins are added or removed."""

    @functools.wraps(make)
    def made() -> R:
        known = registry.loaded().known  # before plugins are called, which may register others
        if made not in known:
            known[made] = make()
        found: R = known[made]
        return found

    return made


@per_catalog
def gather_knowledge() -> Knowledge:
    """Return all records about layers and models. Core's come first, so that a plugin cannot override them."""
    kinds = _known(specs.tunerkit_base_layers)

    def leave_out(kind: type[BaseLayer], error: BaseException) -> None:
        for plugin, known in kinds:
            if known is kind:
                what = f"{kind.__name__} failed to check whether it matches a module: "
                registry.leave_out(plugin, specs.tunerkit_base_layers, error, what)

    return Knowledge(
        kinds=(*CORE.kinds, *(kind for _, kind in kinds)),
        weight_readers=(*CORE.weight_readers, *_records(specs.tunerkit_weight_readers)),
        default_targets=(*CORE.default_targets, *_records(specs.tunerkit_default_targets)),
        libraries=_records(specs.tunerkit_model_libraries),
        unserved=registry.unserved,
        leave_out=leave_out,
    )


@per_catalog
def gather_formats() -> dict[str, Format]:
    """Return the formats of all plugins by name. If two have the same name, the first plugin's is returned."""
    found: dict[str, Format] = {}
    for each in _records(specs.tunerkit_formats):
        found.setdefault(each.name, each)
    return found


@contextmanager
def naming(format: Format, function: str) -> Iterator[None]:
    """If the block raises, add a note to the exception that names the format, its function and its plugin."""
    try:
        with Asking(function, f"format {format.name!r}"):
            yield
    except Exception as error:
        if not isinstance(error, TunerkitError):  # tunerkit's own errors have their advice
            because_of(format, specs.tunerkit_formats, error)
        raise


def configure(method: str, config: object, model: nn.Module) -> AdapterConfig:
    """Return the method's config for a mapping, None (the defaults), a config, or another library's config object."""
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
    """Add a note to ``error`` with the plugin whose ``hook`` returned ``record``; return ``error``."""
    for plugin, known in _known(hook):
        if known is record:
            error.add_note(f"because of {hook.__name__} of {plugin}; {plugin.way_out}")
    return error


@per_catalog
def gather_restrictions() -> tuple[Restriction, ...]:
    """Return the restrictions of all plugins, then one for each library whose plugin is not installed."""
    found = [*_records(specs.tunerkit_restrictions)]
    for library in extras.LIBRARIES:
        if library.verbs and (why := registry.lacking("knows what it does", library.extra)) is not None:
            classes = (library.package,) if library.package else ()
            marks = dict.fromkeys(library.marks)
            found.append(Restriction(library.name, dict.fromkeys(library.verbs, why), classes, marks))
    return tuple(found)


def restrictions_of(kind: type) -> tuple[Restriction, ...]:
    """Return the restrictions that name a class or one of its base classes; cached by class."""
    known: WeakKeyDictionary[type, tuple[Restriction, ...]]
    known = registry.loaded().known.setdefault(restrictions_of, WeakKeyDictionary())
    if kind not in known:
        known[kind] = tuple(r for r in gather_restrictions() if any(is_named(kind, name) for name in r.classes))
    return known[kind]


def wrapped(model: nn.Module) -> None:
    """Call `tunerkit_wrapped` of every plugin. Raises `PluginError` if a plugin changes the model's weights."""
    before = torch_private.versions(model).items()
    for plugin, _ in registry.ask(specs.tunerkit_wrapped, model=model):
        if not before <= torch_private.versions(model).items():
            what = "changed weights of the base, which must be loaded again"
            raise PluginError(f"tunerkit_wrapped of {plugin} {what}; {plugin.way_out}")


def adapted(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Call `tunerkit_adapted` of every plugin; warn if DDP would not synchronize the adapters."""
    tell(specs.tunerkit_adapted, model=model, modules=modules)
    if weights.in_group() and any(parameter.requires_grad for module in modules for parameter in module.parameters()):
        lacking = registry.lacking("detects adapters that DistributedDataParallel does not synchronize")
        if lacking is not None:
            warn(f"this process is in a group. {lacking}. Wrap the model first, then put it into DDP")


def ranks_changed(
    tuner: TunerView, history: list[RankChange], step: int, budget: int, ranks: Mapping[str, int]
) -> None:
    """Add an allocation to the history, and notify every plugin. If a plugin raises, only warn.

    After the next allocation, that plugin is notified again, since a logger's failure may be temporary.
    """
    change = RankChange(step, budget, dict(ranks))
    history.append(change)
    catalog = registry.catalog  # includes plugins that were registered after `attach`
    if catalog is not None:
        for plugin in catalog.hooks["tunerkit_ranks_changed"]:
            with Isolated(partial(_ignore, plugin)):
                catalog.call(plugin, specs.tunerkit_ranks_changed, {"tuner": tuner, "change": change})


def _ignore(plugin: Plugin, error: BaseException) -> None:
    warn(f"tunerkit_ranks_changed of {plugin} failed and was ignored: {error_text(error)}")


# --- Records from plugins ---------------------------------------------------------------------------------------------


def _has_matches(kind: type[BaseLayer]) -> bool:
    return inspect.getattr_static(kind, "matches") is not vars(BaseLayer)["matches"]


def _is_complete(kind: type[BaseLayer]) -> bool:
    # Without both, it would silently match no module; ("name") without a comma is not a tuple.
    named = bool(kind.forwards or _has_matches(kind)) and type(kind.forwards) is tuple
    return named and not inspect.isabstract(kind) and (not kind.linear or kind.matrix is not BaseLayer.matrix)


def _called(plugin: Plugin, what: str, declared: Any, function: Callable[..., Any], *given: Any) -> Any:
    with Asking(what, plugin):
        answer = conform(function(*given), declared)
        if what.startswith("settings ") and not is_json(answer):
            raise Unfit(shown(answer), "a dict that JSON can hold")
        return answer


def _named(plugin: Plugin, record: R) -> R:
    """Return a copy of the record whose functions check their answers and name the plugin in exceptions."""
    if not isinstance(record, Holding | ModelLibrary):
        return record
    kind, values = type(record), attrs.asdict(record, recurse=False)
    for field in attrs.fields(kind):
        if callable(own := values[field.name]) and own is not field.default:
            its = get_args(field.type)[-1]
            values[field.name] = partial(_called, plugin, f"{field.name} of a {kind.__name__}", its, own)
    return kind(**values)


# The keys of a record for which only the first plugin is used.
_SERVED: Final[Mapping[Callable[..., object], Callable[[Any], Iterable[str]]]] = {
    specs.tunerkit_base_layers: lambda kind: () if _has_matches(kind) else kind.forwards,
    specs.tunerkit_weight_readers: lambda record: (record.owner,),
    specs.tunerkit_default_targets: lambda record: record.model_types,
    specs.tunerkit_formats: lambda record: (record.name,),
}


def _records(hook: Callable[[], Iterable[R]]) -> tuple[R, ...]:
    return tuple(record for _, record in _known(hook))


def _known(hook: Callable[[], Iterable[R]]) -> tuple[tuple[Plugin, R], ...]:
    """Return (plugin, record) for each record from ``hook``, cached in the catalog; plugins that fail are left out."""
    catalog = registry.loaded()  # before plugins are called, which may register others
    if hook not in catalog.known:
        catalog.known[hook] = _asked(catalog, hook)
    found: tuple[tuple[Plugin, R], ...] = catalog.known[hook]
    return found


def _asked(catalog: Catalog, hook: Callable[[], Iterable[R]]) -> tuple[tuple[Plugin, R], ...]:
    found: list[tuple[Plugin, R]] = []
    for plugin in catalog.asked(hook):
        with Isolated(partial(registry.leave_out, plugin, hook)):  # metaclasses and properties of answers may raise too
            if (answer := catalog.call(plugin, hook, {})) is None:
                continue
            answer = conform(answer, declared(hook))
            if hook is specs.tunerkit_base_layers and not all(map(_is_complete, answer)):
                each = "each with forwards (a tuple) or matches(), with all methods, and with matrix() if linear"
                raise Unfit(shown(answer), f"{type_name(declared(hook))}, {each}")
            found += [(plugin, _named(plugin, record)) for record in answer]
    firsts: dict[str, Plugin] = {}
    served = _SERVED.get(hook, lambda record: ())
    for plugin, record in found:
        for name in served(record):
            if (first := firsts.setdefault(name, plugin)) is not plugin:
                warn(f"{hook.__name__} of {plugin} is not used for {name!r}: {first} comes first; {first.way_out}")
    return tuple(found)


def gather_holdings() -> list[Holding]:
    """Return the holdings of all plugins whose library is imported."""
    return [each for each in _records(specs.tunerkit_holdings) if not each.package or each.package in sys.modules]


def libraries_of(model: nn.Module) -> list[ModelLibrary]:
    """Return the plugins' `ModelLibrary` records that apply to a model."""
    return [each for each in _records(specs.tunerkit_model_libraries) if each.applies(model)]
