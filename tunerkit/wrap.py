"""Wrap a model: choose targets, build adapters through the method's plugin, inject them; and take them out again."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from tunerkit import base_layers, configs, inject, registry, targets
from tunerkit.adapter import Adapter
from tunerkit.base_layers import BaseLayer
from tunerkit.configs import AdapterConfig
from tunerkit.errors import AdapterError, ConfigError, PluginError, TargetError, closest
from tunerkit.merge import is_merged, merge, restore_originals_
from tunerkit.patterns import matches
from tunerkit.records import Target
from tunerkit.slots import Slot, has_trainable_bias
from tunerkit.steps import detach
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

    Raises `ConfigError`, `TargetError`, `UnknownMethodError`, or `AdapterError` (a bad or taken adapter name, a
    model inside DDP, a merged model); the model is then as it was.
    """
    check_name(adapter)
    refuse_unready(model, adapter)
    config = configure(method, config)
    kinds = all_kinds()
    copies = targets.resolve_modules(model, config.train_modules, what="train_modules")
    targets.refuse_tied(model, copies)
    chosen = targets.select(
        model,
        targets=config.targets,
        exclude=config.exclude,
        layers=config.layers,
        is_adaptable=lambda module: base_layers.describe(module, kinds) is not None,
        trained=copies,
    )
    refuse_idle_patterns(config, chosen)
    biases = choose_biases(model, config.bias, chosen, copies, kinds)
    tuner = Tuner(
        name=adapter,
        method=method,
        config=config,
        model=model,
        targets=chosen,
        copies=targets.from_paths(model, copies),
        biases=biases,
        total_steps=getattr(config, "total_steps", None),
    )
    with seeded(seed):
        plan = build(tuner, kinds)
    inject.inject_(plan, trainable=True)
    return model


def unwrap(model: M, *, keep_merged: bool = False) -> M:
    """Take every adapter out of ``model`` and return it: the base, bit for bit, or with ``keep_merged`` the merged one."""
    tuners = require_tuners(model)
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
        raise TargetError(f"{target.path!r} is a {type(target.module).__name__}: no installed base-layer kind adapts it")
    built = registry.call("tunerkit_build_adapter", tuner.method, target=target, base=base, config=tuner.config)
    if not isinstance(built, Adapter):
        raise PluginError(
            f"the plugin of method {tuner.method!r} ({registry.owner_of(tuner.method).distribution}) built "
            f"{type(built).__name__} for {target.path!r}; tunerkit_build_adapter must return a tunerkit.Adapter"
        )
    weight = next(iter(target.module.parameters(recurse=False)))
    return built.to(device=weight.device, dtype=getattr(torch, tuner.config.adapter_dtype))


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
    found, unknown = [], []
    for path, module in model.named_modules():
        own = module._parameters.get("bias")
        inside = any(path == copied or path.startswith(copied + ".") for copied in copies)
        if own is None or inside or inject.is_adapter_path(path + "."):
            continue
        if has_trainable_bias(module, base_layers.describe(module, kinds)):
            found.append(Target(path=path, module=module))
        else:
            unknown.append(f"{path} ({type(module).__name__})")
    if unknown:
        raise TargetError(f"bias='all' cannot train the bias of: {', '.join(unknown)}; name these in train_modules instead")
    return tuple(found)


def all_kinds() -> tuple[type[BaseLayer], ...]:
    """Core's strict base-layer kinds, then those of every plugin: nobody can take over a plain layer."""
    offered = registry.call_all("tunerkit_base_layers")
    return (*base_layers.KINDS, *(kind for kinds in offered for kind in kinds))


def check_name(adapter: str) -> None:
    """Adapter names become a part of parameter names, hence the limits."""
    if not adapter or len(adapter) > _NAME_LIMIT or "." in adapter or "/" in adapter:
        raise AdapterError(
            f"adapter name {adapter!r}: expected 1 to {_NAME_LIMIT} characters without '.' and '/', choose another"
        )


def refuse_unready(model: nn.Module, adapter: str) -> None:
    """Refuse a model that cannot take another adapter now."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise AdapterError("the model is already inside DistributedDataParallel; wrap it first, then put it into DDP")
    tuners = tuners_of(model)
    if adapter in tuners:
        raise AdapterError(f"the model has an adapter named {adapter!r} already; choose another name or unwrap it first")
    if tuners and is_merged(model):
        raise AdapterError("the model is merged; call tunerkit.unmerge before adding an adapter")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a CPU random state of its own (adapters are built there); without a seed from the global one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
