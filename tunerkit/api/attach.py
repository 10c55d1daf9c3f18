"""Attach: connect a model's adapters to the optimizer or Trainer that trains them."""

import warnings
from collections.abc import Mapping

from torch import nn

from tunerkit import hooks, injection, libraries, serialization, steps
from tunerkit.errors import TunerkitWarning
from tunerkit.injection import Tuner


def attach(
    model: nn.Module,
    optimizer_or_trainer: object,
    *,
    total_steps: int | None = None,
    adapter: str | None = None,
    data_parallel: bool | None = None,
) -> None:
    """Connect adapters to the optimizer or Trainer that trains them. From then on, its steps drive the method.

    This works with every method. If a method needs no steps, they are only counted. If it does, the optimizer's
    ``state_dict`` also contains the method's training state (with a Trainer, its checkpoints do). To resume exactly,
    save and load the model and the optimizer, and attach before you load.

    If this raises, no adapter is attached. A base that is trained too, or was resized after wrapping, triggers a
    warning: no adapter's file holds it.

    Args:
        model: The wrapped model.
        optimizer_or_trainer: A torch optimizer (accelerate's wrapper works too), a transformers or TRL Trainer, or what
            `deepspeed.initialize` returned: its engine or its optimizer.
        total_steps: The length of training in optimizer steps. A Trainer knows its own.
        adapter: The name of one adapter; by default all that are not frozen.
        data_parallel: False if the processes of a group train adapters of their own. By default they train one adapter
            together: `attach` finds out how. If nothing else averages the gradients, tunerkit does at the end of each
            backward, and every process must call this, take every step, and have a backward in each.

    Raises:
        StepError: The total number of steps is missing or differs from the config's; the optimizer does not hold the
            adapter's parameters; the method needs steps, and the optimizer does not support hooks or is inside a
            wrapper that keeps its own state; the adapter is frozen or already attached; the Trainer trains another
            model; an option of TRL's would move or lose weights of adapters; or the processes of a group did not wrap
            alike, which every one of them raises.
        AdapterError: Adapted modules were replaced or resized after wrapping, there is no such adapter, or the model is
            merged, disabled, inside FSDP1, which flattens the adapters, or has layers that peft put on top.
        ConfigError: Training is too short for the method's schedule.
    """
    tuners = _chosen(model, adapter)
    libraries.refuse_engine(injection.base_modules(model), "attach")
    if hooks.attached_by_plugin(tuners, optimizer_or_trainer, total_steps, data_parallel):
        injection.warn_of_base_changes(tuners)
        return
    engine, candidate = steps.engine_for(tuners, model, optimizer_or_trainer, data_parallel)
    earlier = {tuner.name: tuner.steps for tuner in tuners if tuner.steps and tuner.needs_steps}
    optimizer = steps.drive(tuners, candidate, total_steps=total_steps, engine=engine)
    for tuner in tuners:
        steps.watch_optimizers(tuner.method)  # an unpickled adapter was wrapped in another process
        if tuner.needs_steps and optimizer is not None:
            serialization.carry(tuner, optimizer)  # only here: a Trainer's checkpoints have a file for the state
    if earlier:
        _warn_of_restart(earlier)
    injection.warn_of_base_changes(tuners)


def _warn_of_restart(earlier: Mapping[str, int]) -> None:
    """Warn that schedules restart although adapters have been trained; ``earlier`` maps each adapter to its steps."""
    listed = ", ".join(f"{name!r} after {count} steps" for name, count in earlier.items())
    warnings.warn(
        f"the schedule restarts at step 0 for adapter {listed}; to resume that training instead, load "
        "its state: tunerkit.load_state, or the optimizer's state_dict",
        TunerkitWarning,
        stacklevel=3,
    )


def _chosen(model: nn.Module, adapter: str | None) -> list[Tuner]:
    """Return the adapter with this name, or all that are not frozen: a frozen one must not be pruned."""
    if adapter is not None:
        return [injection.tuner(model, adapter)]
    tuners = list(injection.require_tuners(model).values())
    return [tuner for tuner in tuners if not injection.is_frozen(tuner)] or tuners
