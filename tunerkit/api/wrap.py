"""Wrap a model: choose targets, build adapters through the method's plugin, inject them; and take them out again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.config import AdapterConfig
from tunerkit.errors import ConfigError
from tunerkit.injection import (
    Progress,
    Tuner,
    build,
    eject_,
    inject_,
    is_merged,
    ready_model,
    refuse_disabled,
    refuse_idle_patterns,
    require_tuners,
    warn_of_limits,
)
from tunerkit.serialization import merge, restore_originals_
from tunerkit.steps import detach, watch_optimizers
from tunerkit.targets import choose_biases, choose_copies, from_paths, refuse_tied, scan, select

M = TypeVar("M", bound=nn.Module)


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
    root = ready_model(model, adapter)
    config = hooks.configure(method, config)
    scanned = scan(root, hooks.gather_knowledge())
    copies = choose_copies(scanned, config.train_modules)
    refuse_tied(scanned, copies)
    chosen = select(scanned, targets=config.targets, exclude=config.exclude, layers=config.layers, trained=copies)
    tuner = Tuner(
        name=adapter,
        method=method,
        config=config,
        model=root,
        targets=chosen,
        copies=from_paths(scanned, copies),
        biases=choose_biases(scanned, config.bias, chosen, copies),
        progress=Progress(total_steps=config.total_steps),
    )
    refuse_idle_patterns(tuner)
    with seeded(seed):
        slots = build(scanned, tuner)
    warn_of_limits(scanned, tuner)
    inject_(tuner, slots, scanned, trainable=True)
    watch_optimizers(method)
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
        eject_(tuner)
    return model


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
