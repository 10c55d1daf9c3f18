"""Training of a wrapped model: attach its optimizer or Trainer, group its parameters, initialize it from data."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from tunerkit import hooks, injection, serialization, steps
from tunerkit.errors import AdapterError, StepError, warn
from tunerkit.injection import Tuner
from tunerkit.layers import BaseLayer
from tunerkit.records import Statistics, StatisticsRequest

Measure: TypeAlias = Callable[[StatisticsRequest, Mapping[str, BaseLayer]], tuple[Mapping[str, Statistics], int]]


def attach(
    model: nn.Module,
    optimizer_or_trainer: object,
    *,
    total_steps: int | None = None,
    adapter: str | None = None,
    data_parallel: bool | None = None,
) -> None:
    """Connect adapters to their optimizer or Trainer. From then on, each step calls the method.

    This works with every method. If a method needs no steps, they are only counted. If it does, the optimizer's
    ``state_dict`` also contains the method's training state (with a Trainer, its checkpoints do). To resume exactly,
    save and load the model and the optimizer, and attach before you load.

    If this raises, no adapter is attached. A warning is given if the base is trained too, or was resized after
    wrapping: adapter files do not contain it.

    Args:
        model: The wrapped model.
        optimizer_or_trainer: A torch optimizer (accelerate's wrapper works too), a transformers or TRL Trainer, or the
            engine or optimizer from `deepspeed.initialize`.
        total_steps: The length of training in optimizer steps. A Trainer has its own.
        adapter: The name of one adapter; by default all that are not frozen.
        data_parallel: True if the processes of a group train one adapter together, False if each trains its own. By
            default they train together. If nothing else averages the gradients, tunerkit does so at the end of each
            backward, with a warning. Every process must call this, take every step, and have a backward in each.

    Raises:
        StepError: The total number of steps is missing or differs from the config's; the optimizer does not have the
            adapter's parameters; the method needs steps, and the optimizer does not support hooks or is inside a
            wrapper that keeps its own state; the adapter is frozen or already attached; the Trainer trains another
            model; an option of TRL would move or lose weights of adapters; or the processes of a group have different
            adapters, in which case every process raises.
        AdapterError: Adapted modules were replaced or resized after wrapping, there is no such adapter, or the model is
            merged, disabled, inside FSDP1, which flattens the adapters, or has layers that peft put on top.
        ConfigError: Training is too short for the method's schedule.
    """
    if adapter is not None:
        tuners = [injection.tuner(model, adapter)]
    else:  # a frozen one must not be pruned
        every = list(injection.require_tuners(model).values())
        tuners = [tuner for tuner in every if not injection.is_frozen(tuner)] or every
    injection.refuse_restricted(injection.base_modules(model), "attach")
    if isinstance(optimizer_or_trainer, torch.optim.Optimizer) or not hooks.first(
        hooks.specs.tunerkit_attach,
        tuners=tuners,
        candidate=optimizer_or_trainer,
        total_steps=total_steps,
        data_parallel=data_parallel,
    ):
        _attach_optimizer(model, tuners, optimizer_or_trainer, total_steps, data_parallel)
    for tuner in tuners:
        is_new = not (tuner.progress.calibration or tuner.progress.loaded or tuner.steps)
        if is_new and hooks.statistics(tuner) is not None:
            warn(
                f"method {tuner.method!r} is initialized from data, but adapter {tuner.name!r} was not calibrated, so "
                "it trains from other initial values; call tunerkit.calibrate(model, batches) before attach"
            )
    injection.warn_of_base_changes(tuners)


def _attach_optimizer(
    model: nn.Module, tuners: list[Tuner], candidate: object, total_steps: int | None, data_parallel: bool | None
) -> None:
    """Connect adapters to an optimizer, or to an engine's wrapper around it."""
    engine, candidate = steps.engine_for(tuners, model, candidate, data_parallel)
    needing = [tuner for tuner in tuners if injection.needs_steps(tuner)]
    earlier = ", ".join(f"{tuner.name!r} after {tuner.steps} steps" for tuner in needing if tuner.steps)
    optimizer = steps.drive(tuners, candidate, total_steps=total_steps, engine=engine)
    if optimizer is not None:
        for tuner in needing:
            serialization.carry(tuner, optimizer)  # only here: a Trainer's checkpoints have a file for the state
    if earlier:
        warn(
            f"the schedule restarts at step 0 for adapter {earlier}; to resume that training instead, load its state "
            "with tunerkit.load_state, or the optimizer's state_dict"
        )


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside the block, backwards accumulate gradients locally; the next backward after the block averages them.

    This saves an all-reduce for each accumulated batch, like ``DistributedDataParallel.no_sync``. It is optional: the
    result is the same without it. The equivalents of DDP, FSDP2 with sharded adapters, DeepSpeed and accelerate work
    too. If no backward follows the block, the optimizer step averages, which is too late for clipping.

    Args:
        model: The wrapped model, with its adapters attached.

    Raises:
        AdapterError: The model has no adapter.
    """
    with ExitStack() as stack:
        for tuner in injection.require_tuners(model).values():
            stack.enter_context(tuner.engine.no_sync())
        yield


def param_groups(model: nn.Module, *, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Return all trained parameters of a wrapped model as parameter groups for an optimizer.

    A method may set a learning-rate factor or a weight decay for some of its parameters. If none does, the result is
    one group. An attached Trainer makes the same groups itself::

        optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-3))
        tunerkit.attach(model, optimizer, total_steps=1000)

    Args:
        model: The wrapped model.
        lr: The learning rate.
        weight_decay: The weight decay of the parameters for which no method sets one; None for the optimizer's default.

    Returns:
        Groups with ``params`` and ``lr``, and ``weight_decay`` if one is set. Each trained parameter is in one group.

    Raises:
        StepError: ``lr`` or ``weight_decay`` is not a number, or negative; or nothing is trained.
        AdapterError: The model has no adapter.
        PluginError: A method returns invalid groups.
    """
    own: dict[str, Any] = {"lr": lr} if weight_decay is None else {"lr": lr, "weight_decay": weight_decay}
    for name, value in own.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise StepError(f"expected a finite number >= 0 as {name}, got {value!r}")
    tuners = injection.require_tuners(model).values()
    trained = [parameter for parameter in injection.wrapped_model(model).parameters() if parameter.requires_grad]
    if not trained:
        raise StepError("every adapter is frozen, so there is nothing to train; call tunerkit.thaw first")
    return [group for group in injection.regrouped([{"params": trained, **own}], tuners) if group["params"]]


def fit_start_(tuner: Tuner, measure: Measure) -> None:
    """Set an adapter's initial values and ranks from data, with the method's hook `tunerkit_calibrate`.

    `tunerkit.calibrate` is built on this. The method requests statistics, see `tunerkit.plugin.StatisticsRequest`.
    During the call, the model is in eval mode with gradients on; its modes and the random state are restored.

    Args:
        tuner: The tuner of an adapter that is unchanged since `tunerkit.wrap`.
        measure: Runs the model on the data. It gets the request and the base layers by target path, and returns the
            statistics by target path, and the number of batches.

    Raises:
        AdapterError: The method needs no data with these settings, training has begun, or the model is merged or
            disabled.
        PluginError: The method's plugin violates the contract of the hook.
    """
    if (request := hooks.statistics(tuner)) is None:
        raise AdapterError(
            f"adapter {tuner.name!r} of method {tuner.method!r} needs no data with its settings; train it directly"
        )
    # If the method starts with ΔW = 0, another ΔW shows that a loop without `attach` has trained the adapter.
    starts_at_0 = hooks.registry.get(tuner.method).start == "exact" and hooks.has_delta(tuner.method)
    states = {
        "loaded from a file": tuner.progress.loaded,
        "trained": tuner.steps > 0 or (starts_at_0 and not injection.adds_nothing(tuner)),
        "attached to an optimizer": steps.is_attached(tuner),
    }
    for state, holds in states.items():
        if holds:
            raise AdapterError(
                f"adapter {tuner.name!r} is already {state}, and calibrating would overwrite it: calibrate right after "
                "tunerkit.wrap"
            )
    injection.refuse_fixed(tuner.model, "calibrating")
    modules = injection.modules_in(tuner)
    slots = {path: injection.slots_of(modules[path]) for path in tuner.adapters()}
    bases = {path: each.base for path, each in slots.items() if each is not None and each.base is not None}
    with (
        injection.evaluating(tuner.model),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        found, count = measure(request, bases)
        with torch.no_grad():
            spec = hooks.specs.tunerkit_calibrate
            ranks = hooks.ask(spec, tuner.method, tuner=tuner, statistics=found, bases=bases)
    tuner.progress.calibration = {"batches": count, "rows": max(each.rows for each in found.values())}
    injection.record(tuner, ranks)
