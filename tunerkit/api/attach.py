"""Attach: connect a model's adapters to the optimizer or Trainer that trains them, and what their loop needs of it."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from tunerkit import hooks, injection, serialization, steps
from tunerkit.errors import StepError, warn
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
    injection.refuse_restricted(injection.base_modules(model), "attach")
    answers = hooks.registry.ask(
        hooks.specs.tunerkit_attach,
        tuners=tuners,
        candidate=optimizer_or_trainer,
        total_steps=total_steps,
        data_parallel=data_parallel,
    )
    if any(answer.value for answer in answers):
        injection.warn_of_base_changes(tuners)
        return
    engine, candidate = steps.engine_for(tuners, model, optimizer_or_trainer, data_parallel)
    needing = [tuner for tuner in tuners if injection.needs_steps(tuner)]
    earlier = ", ".join(f"{tuner.name!r} after {tuner.steps} steps" for tuner in needing if tuner.steps)
    optimizer = steps.drive(tuners, candidate, total_steps=total_steps, engine=engine)
    if optimizer is not None:
        for tuner in needing:
            serialization.carry(tuner, optimizer)  # only here: a Trainer's checkpoints have a file for the state
    if earlier:
        warn(
            f"the schedule restarts at step 0 for adapter {earlier}; to resume that training instead, load its state: "
            "tunerkit.load_state, or the optimizer's state_dict"
        )
    injection.warn_of_base_changes(tuners)


def _chosen(model: nn.Module, adapter: str | None) -> list[Tuner]:
    """Return the adapter with this name, or all that are not frozen: a frozen one must not be pruned."""
    if adapter is not None:
        return [injection.tuner(model, adapter)]
    tuners = list(injection.require_tuners(model).values())
    return [tuner for tuner in tuners if not injection.is_frozen(tuner)] or tuners


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside the block, backwards add up gradients in each process; the next backward after it averages them.

    This saves an all-reduce for each batch that is accumulated, as ``DistributedDataParallel.no_sync`` does. It is
    never needed: without it, the result is the same. DDP, FSDP2 with sharded adapters, DeepSpeed and accelerate have
    ways of their own to say that, which work too. If no backward comes after the block, the step averages, which is too
    late for clipping.

    Args:
        model: The wrapped model, with its adapters attached.

    Raises:
        AdapterError: The model has no adapter.
    """
    with ExitStack() as stack:
        for tuner in injection.require_tuners(model).values():
            if tuner.engine is not None:
                stack.enter_context(tuner.engine.no_sync())
        yield


def param_groups(model: nn.Module, *, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Return everything that a wrapped model trains as parameter groups for an optimizer.

    A method may want a factor on the learning rate or its own weight decay for some of its parameters. If none does,
    the result is one group. A Trainer that is attached makes the same groups itself::

        optimizer = torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-3))
        tunerkit.attach(model, optimizer, total_steps=1000)

    Args:
        model: The wrapped model.
        lr: The learning rate.
        weight_decay: The weight decay of the parameters for which no method sets one; None for the optimizer's default.

    Returns:
        Groups with ``params`` and ``lr``, and ``weight_decay`` where one is set. Each trained parameter is in one of
        them.

    Raises:
        StepError: ``lr`` or ``weight_decay`` is not a number, or negative; or nothing is trained.
        AdapterError: The model has no adapter.
        PluginError: A method returns invalid groups.
    """
    own: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
    for name, value in {"lr": lr, **own}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise StepError(f"expected a finite number >= 0 as {name}, got {value!r}")
    root = injection.wrapped_model(model)
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    if not trained:
        raise StepError("every adapter is frozen, so there is nothing to train; call tunerkit.thaw first")
    groups = injection.regrouped([{"params": trained, "lr": lr, **own}], injection.require_tuners(root).values())
    return [group for group in groups if group["params"]]
