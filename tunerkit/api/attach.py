"""Attach: connect the adapters of a model with what trains them."""

import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from tunerkit.errors import TunerkitWarning
from tunerkit.hooks import registry
from tunerkit.injection import Tuner, is_frozen, require_tuners
from tunerkit.injection import tuner as find_tuner
from tunerkit.libraries import TRAINER, derives_from
from tunerkit.serialization import carry
from tunerkit.steps import drive


def attach(
    model: nn.Module, optimizer_or_trainer: object, *, total_steps: int | None = None, adapter: str | None = None
) -> None:
    """Connect the adapters of ``model`` that are trained (or the one named) with what trains them.

    That is an optimizer or a Trainer; from here on every optimizer step drives the method. ``total_steps`` is the
    length of training in optimizer steps; a Trainer knows its own. Legal for every method; one that needs no steps
    only has them counted. The training state of one that needs them travels in the optimizer's ``state_dict``: a loop
    that saves and loads model and optimizer resumes exactly, if it attaches before it loads.

    Raises `StepError`: total steps unknown, disagreeing with the config's, an optimizer that does not hold the
    adapter's parameters, takes no hooks or is wrapped in one with a state of its own, a frozen adapter, attached twice;
    `AdapterError` if adapted modules were replaced or resized after wrapping; and `ConfigError` if the schedule leaves
    no room. No adapter is attached then.
    """
    tuners = _chosen(model, adapter)
    if derives_from(optimizer_or_trainer, TRAINER):  # TRL's are too
        from tunerkit.integrations import transformers as integration  # transformers is an optional dependency

        integration.attach_trainer(tuners, cast(Any, optimizer_or_trainer), total_steps)
        return
    earlier = {tuner.name: tuner.steps for tuner in tuners if tuner.steps and registry.get(tuner.method).needs_steps}
    optimizer = drive(tuners, optimizer_or_trainer, total_steps=total_steps)
    for tuner in tuners:
        if registry.get(tuner.method).needs_steps:
            carry(tuner, optimizer)  # a Trainer's checkpoints have a file for it
    if earlier:
        _warn_of_restart(earlier)


def _warn_of_restart(earlier: Mapping[str, int]) -> None:
    """Tell of schedules that begin anew although training has been going on; ``earlier`` are the steps by adapter."""
    told = ", ".join(f"{name!r} after {count} steps" for name, count in earlier.items())
    warnings.warn(
        f"the schedule begins anew at step 0 for adapter {told}; to go on with that training instead, load "
        "its state: tunerkit.load_state, or the optimizer's state_dict",
        TunerkitWarning,
        stacklevel=3,
    )


def _chosen(model: nn.Module, adapter: str | None) -> list[Tuner]:
    """The adapter named, else all that are trained: a frozen one beside them must not be pruned."""
    if adapter is not None:
        return [find_tuner(model, adapter)]
    tuners = list(require_tuners(model).values())
    return [tuner for tuner in tuners if not is_frozen(tuner)] or tuners
