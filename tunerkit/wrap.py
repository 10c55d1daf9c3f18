"""Wrap a model: choose targets, build adapters through the method's plugin, inject them; and take them out again."""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar, cast

import torch
from torch import nn

from tunerkit import base_layers, configs, inject, registry, targets
from tunerkit.adapter import Adapter
from tunerkit.base_layers import BaseLayer
from tunerkit.configs import AdapterConfig
from tunerkit.errors import AdapterError, ConfigError, PluginError, TargetError, TunerkitWarning, closest
from tunerkit.merge import is_merged, merge, refuse_disabled, restore_originals_
from tunerkit.patterns import matches
from tunerkit.records import Target
from tunerkit.slots import CHILD, Slot, has_trainable_bias, slots_of, walk
from tunerkit.steps import detach
from tunerkit.survey import is_under, join, parent, tied
from tunerkit.tuner import Tuner, require_tuners, tuners_of

_NAME_LIMIT = 64

M = TypeVar("M", bound=nn.Module)


def structure(method: str, mapping: Mapping[str, object]) -> AdapterConfig:
    """The config of ``method`` from a mapping (parsed YAML or JSON), strictly; `ConfigError` names every problem."""
    config: AdapterConfig = configs.structure(registry.get(method).config, mapping)
    return config


def unstructure(config: AdapterConfig) -> dict[str, object]:
    """A config as a mapping that JSON and YAML can hold; `structure` gives the equal config back."""
    return configs.unstructure(config)


def wrap(
    model: M,
    method: str,
    config: AdapterConfig | Mapping[str, object] | None = None,
    *,
    adapter: str = "default",
    seed: int | None = None,
) -> M:
    """Put an adapter of ``method`` into ``model``, in place, and return the same object.

    The base is frozen, keeps its types, names and values, and the first output is bit-identical (dropout off).
    ``config`` is the method's attrs object, a mapping, or None for defaults. ``seed`` makes the start repeatable and
    leaves the global random state alone.

    Raises `ConfigError`, `TargetError`, `UnknownMethodError`, `PluginError`, or `AdapterError` (a bad or taken
    adapter name, a model inside DDP, a merged model); the model is then as it was.
    """
    check_name(adapter)
    root = inside_compiled(model)
    refuse_unready(root, adapter)
    config = configure(method, config)
    kinds = all_kinds()
    copies = choose_copies(root, config.train_modules)
    targets.refuse_tied(root, copies)
    chosen = targets.select(
        root,
        targets=config.targets,
        exclude=config.exclude,
        layers=config.layers,
        is_adaptable=lambda module: base_layers.describe(module, kinds) is not None,
        trained=copies,
    )
    refuse_idle_patterns(config, chosen)
    biases = choose_biases(root, config.bias, chosen, copies, kinds)
    tuner = Tuner(
        name=adapter,
        method=method,
        config=config,
        model=root,
        targets=chosen,
        copies=targets.from_paths(root, copies),
        biases=biases,
        total_steps=getattr(config, "total_steps", None),
    )
    with seeded(seed):
        plan = build(tuner, kinds)
    inject.inject_(plan, trainable=True)
    warn_of_statistics(root, copies)
    return model


def unwrap(model: M, *, keep_merged: bool = False) -> M:
    """Take every adapter out of ``model`` and return it: the base, bit for bit, or merged with ``keep_merged``."""
    tuners = require_tuners(model)
    refuse_disabled(model)
    root = next(iter(tuners.values())).model
    if keep_merged:
        if not is_merged(root):
            merge(root, permanent=True)
    else:
        restore_originals_(root)
    for tuner in list(tuners.values()):
        detach(tuner)
        inject.eject_(tuner)
    return model


def configure(method: str, config: object) -> AdapterConfig:
    """Whatever the user gave as config, as the method's own class."""
    expected = registry.get(method).config
    if config is None:
        config = {}
    if isinstance(config, Mapping):
        return structure(method, config)
    if not isinstance(config, expected) or not isinstance(config, AdapterConfig):
        raise ConfigError(
            [f"method {method!r} takes {expected.__name__}, a mapping or None, got {type(config).__name__} @ $"]
        )
    return config


def build(tuner: Tuner, kinds: tuple[type[BaseLayer], ...]) -> inject.Plan:
    """Build every slot of ``tuner``; the model is only read."""
    inject.refuse_overlap(tuner.model, tuner.modules(), tuple(place.path for place in tuner.copies))
    bases = {path: base_layers.describe(module, kinds) for path, module in tuner.modules().items()}
    targeted = {target.path: target for target in tuner.targets}
    biased = {place.path for place in tuner.biases}
    copied = {place.path for place in tuner.copies}
    slots = {}
    for path, module in tuner.modules().items():
        if path not in targeted and any(parameter.is_meta for parameter in module.parameters()):
            raise TargetError(f"{path!r} has weights on the meta device and cannot be copied; load the weights first")
        if path in copied:
            slots[path] = Slot(copy=copy.deepcopy(module))
            continue
        built = build_adapter(tuner, targeted[path], bases[path]) if path in targeted else None
        bias = nn.Parameter(module.get_parameter("bias").detach().clone()) if path in biased else None
        slots[path] = Slot(adapter=built, bias=bias)
    return inject.Plan(tuner=tuner, slots=slots, bases={p: None if p in copied else base for p, base in bases.items()})


def build_adapter(tuner: Tuner, target: Target, base: BaseLayer | None) -> Adapter:
    """One adapter from the method's own plugin, moved to its base layer's device and the config's dtype."""
    if base is None:
        kind = type(target.module).__name__
        raise TargetError(f"{target.path!r} is a {kind}: no installed base-layer kind adapts it")
    built = registry.call("tunerkit_build_adapter", tuner.method, target=target, base=base, config=tuner.config)
    if not isinstance(built, Adapter):
        raise PluginError(
            f"the plugin of method {tuner.method!r} ({registry.owner_of(tuner.method).distribution}) built "
            f"{type(built).__name__} for {target.path!r}; tunerkit_build_adapter must return a tunerkit.Adapter"
        )
    if target.module in built.modules():
        raise PluginError(
            f"the plugin of method {tuner.method!r} ({registry.owner_of(tuner.method).distribution}) built an adapter "
            f"that holds {target.path!r} as a child; forward is given the base layer, so do not keep it"
        )
    own = chain(target.module.parameters(recurse=False), target.module.buffers(recurse=False))
    device = next((tensor.device for tensor in own), None)
    return built.to(device=device, dtype=getattr(torch, tuner.config.adapter_dtype))


def refuse_idle_patterns(config: AdapterConfig, chosen: tuple[Target, ...]) -> None:
    """A per-target setting that reaches no target is a mistake, most often a mistyped name."""
    paths = [target.path for target in chosen]
    names = {path.rpartition(".")[2] for path in paths}
    problems = [
        f"{pattern!r} matches none of the {len(paths)} targets{closest(pattern, names)} @ $.{field}"
        for pattern, field in config.target_patterns()
        if not any(matches(pattern, path) for path in paths)
    ]
    if problems:
        raise ConfigError(problems)


def choose_copies(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """The modules trained in full as copies: those named, and in place of containers what they hold.

    A container runs whatever it holds, or is not run itself: a copy beside its children would be run as one of them.
    """
    found: list[str] = []
    for path in targets.resolve_modules(model, names, what="train_modules"):
        leaves = [leaf for leaf, module in _uncontained(path, model.get_submodule(path)) if _has_tensors(module)]
        if not leaves:
            raise TargetError(f"train_modules: {path!r} holds nothing to train; leave it out")
        found += leaves
    return tuple(found)


def _uncontained(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        yield path, module
        return
    if any(parameter is not None for parameter in module._parameters.values()):
        kind = type(module).__name__
        raise TargetError(f"train_modules: {path!r} is a {kind} with parameters of its own; name the modules in it")
    for name, child in module.named_children():
        yield from _uncontained(join(path, name), child)


def _has_tensors(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def choose_biases(
    model: nn.Module,
    bias: str,
    chosen: tuple[Target, ...],
    copies: tuple[str, ...],
    kinds: tuple[type[BaseLayer], ...],
) -> tuple[Target, ...]:
    """The modules whose bias is trained: none, the targets' own, or all of the model's."""
    if bias == "none":
        return ()
    if bias == "adapters":
        return tuple(t for t in chosen if has_trainable_bias(t.module, base_layers.describe(t.module, kinds)))
    found, problems = [], []
    shared = tied(model)
    modules = {path: module for path, module in model.named_modules() if not inject.is_adapter_path(path + ".")}
    for path, module in modules.items():
        own = {name: p for name, p in module._parameters.items() if p is not None and "bias" in name}
        if not own or is_under(path, copies):
            continue
        others = [name for name in shared.get(id(own.get("bias")), ()) if name != join(path, "bias")]
        if others:
            problems.append(f"{join(path, 'bias')} (tied to {', '.join(others)})")
        elif (
            set(own) == {"bias"}
            and _is_called(path, modules)
            and has_trainable_bias(module, base_layers.describe(module, kinds))
        ):
            found.append(Target(path=path, module=module))
        else:
            problems += [f"{join(path, name)} (of a {type(module).__name__})" for name in own]
    if problems:
        listed = ", ".join(problems)
        raise TargetError(
            f"bias='all' cannot train: {listed}; name their modules in train_modules or set bias='adapters'"
        )
    return tuple(found)


def _is_called(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module runs its forward: attention reads its output projection past it."""
    return not path or not isinstance(modules[parent(path)], nn.MultiheadAttention)


def all_kinds() -> tuple[type[BaseLayer], ...]:
    """Core's strict base-layer kinds, then those of every plugin: nobody can take over a plain layer."""
    offered = registry.call_all("tunerkit_base_layers")
    for kinds in offered:
        for kind in kinds if isinstance(kinds, tuple | list) else (kinds,):
            if not _is_kind(kind):
                raise PluginError(
                    f"{_offerer(kinds)} offered {kind!r} as a base-layer kind; tunerkit_base_layers must return a list "
                    "of classes that derive from tunerkit.BaseLayer and define all it asks for"
                )
    return (*base_layers.KINDS, *(kind for kinds in offered for kind in cast(list[type[BaseLayer]], kinds)))


def _is_kind(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseLayer) and not inspect.isabstract(kind)


def _offerer(kinds: object) -> str:
    """Whose answer this is, found by asking again: answers come without names."""
    for method, info in registry.methods().items():
        if info.error is None and registry.implements("tunerkit_base_layers", method):
            answers = registry.call("tunerkit_base_layers", method)
            if any((tuple(a) if isinstance(a, Iterator) else a) == kinds for a in answers):
                return f"the plugin of method {method!r} ({info.distribution})"
    return "a plugin without methods"


def check_name(adapter: object) -> None:
    """Adapter names become a part of parameter names, hence the limits."""
    if not isinstance(adapter, str) or not 1 <= len(adapter) <= _NAME_LIMIT or "." in adapter or "/" in adapter:
        raise AdapterError(
            f"adapter name {adapter!r}: expected 1 to {_NAME_LIMIT} characters without '.' and '/', choose another"
        )


def refuse_unready(model: nn.Module, adapter: str) -> None:
    """Refuse a model that cannot take another adapter now."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise AdapterError("the model is already inside DistributedDataParallel; wrap it first, then put it into DDP")
    tuners = tuners_of(model)
    root = next((other.model for other in tuners.values()), None)
    if root is not model and (tuners or next(walk(model), None) is not None):
        whole = f"the {type(root).__name__} inside it" if root is not None else "the model that it is a part of"
        raise AdapterError(f"{whole} has adapters already; wrap that one, so that one model holds them all")
    foreign = [path for path, module in model.named_modules() if hasattr(module, CHILD) and slots_of(module) is None]
    foreign = [path for path in foreign if not inject.is_adapter_path(path + ".")]
    if foreign:
        raise AdapterError(
            f"the model has an attribute {CHILD!r} of its own at {foreign[0]!r}; adapters go there: rename it"
        )
    refuse_disabled(model)
    if adapter in tuners:
        raise AdapterError(f"the model has an adapter named {adapter!r} already; choose another name or unwrap first")
    if tuners and is_merged(model):
        raise AdapterError("the model is merged; call tunerkit.unmerge before adding an adapter")


def inside_compiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given: paths must not depend on whether it is compiled."""
    while (inner := model._modules.get("_orig_mod")) is not None:
        model = inner
    return model


def warn_of_statistics(model: nn.Module, copies: tuple[str, ...]) -> None:
    """Tell of norms in the frozen base whose statistics training moves all the same: an adapter's file lacks them."""
    moving = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.track_running_stats
        and module.running_mean is not None
        and not is_under(path, copies)
        and not inject.is_adapter_path(path + ".")
    ]
    if moving:
        warnings.warn(
            f"{len(moving)} normalisation layers of the frozen base ({moving[0]}, ...) move their running statistics "
            "in training mode; the adapter's file does not hold them. Put them in eval mode while training, or name "
            "them in train_modules",
            TunerkitWarning,
            stacklevel=3,
        )


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a CPU random state of its own (adapters are built there); without a seed from the global one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
