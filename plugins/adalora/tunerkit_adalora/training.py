"""AdaLoRA's training state between steps."""

from operator import mul

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import StepError, Tuner
from tunerkit_adalora.budget import Bounds, bounds_of, check_bounds, costs_of, live_budget, schedule_of
from tunerkit_adalora.config import AdaLoraConfig, Resolved
from tunerkit_adalora.gradient_counts import GradientCount
from tunerkit_adalora.importance import Averages, Part, new_averages, stacks_of, unstack
from tunerkit_adalora.phase import Phase
from tunerkit_adalora.preconditions import refuse_revived, refuse_sharded, refuse_sharded_stacks
from tunerkit_adalora.schedule import Schedule, is_short, refuse_short
from tunerkit_adalora.svd_layer import SvdLayer, weights_of


@attrs.define(eq=False)
class Training:
    """AdaLoRA's training state.

    Attributes:
        config: The adapter's settings.
        layers: The SVD layers in the order of the targets, for the step hooks: a search for all layers in the model
            costs more than the rest of a step.
        resolved: The config's settings with their defaults applied.
        bounds: The least and the greatest rank of each target, or of each matrix of its stack.
        schedule: b(t).
        running: The running averages of this process's shards of the weights; empty once the ranks are final.
        gradients: Counts of gradients since the last allocation.
        costs: The cost of a triplet of each layer, in the config's unit.
        matrices: The number of matrices in each weight: three times E for a stack, three times 1 for another layer.
        in_force: The budget of the last allocation, in the same unit.
        sizes: The number of triplets of each layer in memory, including dead ones.
        weights: P, λ and Q of each layer, cached between the hooks before and after a step; empty with a shared engine.
        last_step: The last step's number; 0 before the first.
        phase: The phase of the training.
    """

    config: AdaLoraConfig
    layers: list[SvdLayer]
    resolved: Resolved
    bounds: Bounds
    schedule: Schedule
    running: list[Averages]
    gradients: GradientCount
    costs: list[int]
    matrices: list[int]
    in_force: int
    sizes: list[int]
    weights: list[nn.Parameter] = attrs.field(factory=list)
    last_step: int = 0
    phase: Phase = Phase.WAITING

    @property
    def averages(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return Ī and Ū of each weight: P, λ, Q of the first layer, then of the second; empty once ranks are final."""
        return unstack(stacks_of(self.running))


def start(tuner: Tuner, total_steps: int) -> Training:
    """Return the training state before the first step, with averages of 0.

    A loaded, pruned adapter keeps its masks until the first step, so that it can still be saved unchanged. At the first
    step, every triplet in memory becomes live. Triplets removed from memory do not return, so the budget starts at the
    cost of the remaining triplets. A training too short to prune may continue a finished one, whose masks then stay.

    Args:
        tuner: The tuner that is attached.
        total_steps: T, in optimizer steps.

    Returns:
        The state.

    Raises:
        ConfigError: Schedule, budget and bounds contradict each other, or training is too short to prune.
        StepError: The weights are sharded, and the engine returns no shards of them, or there is a stack of matrices.
    """
    config = config_of(tuner)
    layers = layers_of(tuner)
    weights = weights_of(layers)
    if set(map(type, weights)) - {nn.Parameter}:
        refuse_sharded(tuner, weights)
    pieces = tuner.pieces(weights)
    if pieces.are_cut:
        refuse_sharded_stacks(tuner, layers)
    resolved, costs = config.resolved(), costs_of(config, layers)
    schedule = schedule_of(config, resolved, layers, costs, total_steps)
    bounds = bounds_of(config, resolved, tuner.targets)
    check_bounds(config, bounds, tuner.targets, layers, costs, schedule.target)
    sizes = [layer.lam.numel() for layer in layers]
    there = sum(map(mul, sizes, costs))
    schedule = attrs.evolve(schedule, initial=there, target=min(schedule.target, there))
    in_force = live_budget(layers, costs)
    masks_stay = is_short(schedule) and in_force <= schedule.target
    if not masks_stay:
        refuse_short(schedule)
    return Training(
        config=config,
        layers=layers,
        resolved=resolved,
        bounds=bounds,
        schedule=schedule,
        running=new_averages([] if masks_stay else pieces.values),
        gradients=GradientCount(torch.zeros((), dtype=torch.int64, device=layers[0].lam.device)),
        costs=costs,
        matrices=[count for layer in layers for count in [layer.matrices] * len(Part)],
        in_force=in_force,
        sizes=sizes,
        phase=Phase.FINAL_MASKED if masks_stay else Phase.WAITING,
    )


def budget(tuner: Tuner, step: int | None) -> int:
    """Return the budget in force.

    For a loaded adapter it is the cost of the live triplets. In parameters, this may be less than the budget that was
    allocated, if the rest was too small for another triplet.

    Args:
        tuner: The tuner, attached or not.
        step: The number of optimizer steps, for the schedule's budget; None for the last allocation's budget.

    Returns:
        The budget, in the config's unit.

    Raises:
        StepError: A step is given, but the total steps are unknown.
        AdapterError: Weights of another step were loaded, with more live triplets than the budget in force.
    """
    training = tuner.state
    if isinstance(training, Training) and step is not None:
        return training.schedule.budget(step)
    if isinstance(training, Training):
        there = sum(map(mul, [layer.lam.numel() for layer in training.layers], training.costs))
        if there > training.in_force and training.phase is not Phase.WAITING:  # else no mask could keep more
            live = live_budget(training.layers, training.costs)
            # A Trainer that loads its best weights sets their step too.
            if live > training.in_force and tuner.steps == training.last_step:
                refuse_revived(tuner.name, live, training.in_force, training.last_step)
        return training.in_force
    config, layers = config_of(tuner), layers_of(tuner)
    if step is None:
        return live_budget(layers, costs_of(config, layers))
    total_steps = tuner.total_steps if tuner.total_steps is not None else config.total_steps
    if total_steps is None:
        raise StepError("the schedule needs the total steps: call tunerkit.attach first, or set total_steps")
    return schedule_of(config, config.resolved(), layers, costs_of(config, layers), total_steps).budget(step)


def config_of(tuner: Tuner) -> AdaLoraConfig:
    """Return the tuner's config as an `AdaLoraConfig`."""
    assert isinstance(tuner.config, AdaLoraConfig)
    return tuner.config


def layers_of(tuner: Tuner) -> list[SvdLayer]:
    """Return the current SVD layers in the order of the targets."""
    return [adapter for adapter in tuner.adapters().values() if isinstance(adapter, SvdLayer)]


def training_of(tuner: Tuner) -> Training:
    """Return the tuner's training state. Raises `StepError` if the adapter is not attached."""
    if not isinstance(tuner.state, Training):
        raise StepError(
            f"adapter {tuner.name!r} is not attached; call tunerkit.attach(model, optimizer, total_steps=...)"
        )
    return tuner.state
