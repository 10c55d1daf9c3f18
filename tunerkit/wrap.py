"""Wrap a model: choose targets, build adapters through the method's plugin, inject them; and take them out again."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from tunerkit import configs, inject, lending, registry, targets
from tunerkit.building import all_kinds, build, choose_biases, choose_copies
from tunerkit.configs import AdapterConfig
from tunerkit.errors import ConfigError, TunerkitWarning, closest
from tunerkit.kinds import describe
from tunerkit.merge import is_merged, merge, refuse_disabled, restore_originals_
from tunerkit.patterns import matches
from tunerkit.readiness import check_name, refuse_unready
from tunerkit.records import Target
from tunerkit.steps import detach
from tunerkit.survey import is_under
from tunerkit.tuner import Tuner, require_tuners
from tunerkit.wrappers import inside

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
    leaves the global random state alone. A further adapter is active beside those that are.

    Raises `ConfigError`, `TargetError`, `UnknownMethodError`, `PluginError`, or `AdapterError` (a bad or taken
    adapter name, a model inside DDP, a merged model); the model is then as it was.
    """
    check_name(adapter)
    root = inside(model)
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
        is_adaptable=lambda module: describe(module, kinds) is not None,
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
    warn_of_statistics(root, copies)
    warn_of_dropout(plan)
    inject.inject_(plan, trainable=True)
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


def warn_of_dropout(plan: inject.Plan) -> None:
    """Tell of targets whose input is seen by nobody: the adapter's dropout cannot be applied there."""
    tuner = plan.tuner
    lent = [t.path for t in tuner.targets if lending.lender(tuner.model, t.path, plan.bases[t.path]) is not None]
    dropout: object = getattr(tuner.config, "dropout", None)
    if lent and dropout:
        warnings.warn(
            f"dropout is not applied at {len(lent)} targets ({lent[0]}, ...): their owner reads the weight past the "
            "layer's forward, so the adapter changes the weight and never sees an input. Set dropout to 0 or exclude "
            "them if that matters",
            TunerkitWarning,
            stacklevel=3,
        )


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a CPU random state of its own (adapters are built there); without a seed from the global one."""
    if seed is None:
        yield
        return
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise ConfigError([f"expected an int of 64 bits or None, got {type(seed).__name__} {seed!r} @ seed"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
