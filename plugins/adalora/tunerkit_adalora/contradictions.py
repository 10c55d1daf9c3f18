"""Contradictions between a saved training state and the adapter to which it is restored."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tunerkit.plugin import Tuner
from tunerkit_adalora.budget import costs_of, schedule_of
from tunerkit_adalora.phase import Phase
from tunerkit_adalora.state_values import SavedValues
from tunerkit_adalora.svd_layer import SvdLayer
from tunerkit_adalora.training import Training, config_of


def contradictions(
    tuner: Tuner, training: Training, values: SavedValues, layers: Sequence[SvdLayer], masks: Sequence[Tensor]
) -> Iterator[str]:
    """Find contradictions between a saved training state and the adapter.

    Args:
        tuner: The tuner.
        training: The tuner's current training state, with the schedule.
        values: The saved values, which are consistent with each other.
        layers: The adapter's layers, whose shapes fit the state.
        masks: The saved mask of each layer, bool (r,), or (E, r).

    Yields:
        One line for each contradiction.
    """
    costs = costs_of(config_of(tuner), layers)
    live = sum(int(mask.sum()) * cost for mask, cost in zip(masks, costs, strict=True))
    there = sum(layer.lam.numel() * cost for layer, cost in zip(layers, costs, strict=True))
    if live > values.in_force:
        yield f"the masks keep {live}, above the budget 'in_force' {values.in_force}"
    revived = sum(int((mask & ~layer.mask).sum()) for mask, layer in zip(masks, layers, strict=True))
    if revived:
        yield f"the masks keep {revived} triplets that are pruned in the adapter, whose weights are of another step"
    if values.shrunk and live < there:
        yield f"'shrunk' is true, but the masks keep {live} of {there}"
    if there > values.initial:
        yield f"the adapter's triplets cost {there}, above 'initial' {values.initial}"
    planned = schedule_of(config_of(tuner), training.resolved, layers, costs, training.schedule.total_steps)
    if values.initial > planned.initial:
        yield f"'initial' {values.initial} is above {planned.initial}, which init_rank allows"
    if values.target > planned.target:
        yield f"'target' {values.target} is above {planned.target}, which the config asks for"
    if planned.is_final(values.last_step) and not values.final:
        yield f"'final' is false after step {values.last_step}, but the ranks are final from {planned.final_step} on"
    if tuner.steps and values.last_step != tuner.steps:
        yield f"'last_step' is {values.last_step} after {tuner.steps} steps"
    most = values.averaged * sum(training.matrices)
    if values.seen > most:
        yield f"'seen' is {values.seen}, above {most}: {values.averaged} averaged steps of {len(layers)} layers"


def impossible_averages(averages: dict[str, Tensor], phase: Phase) -> Iterator[str]:
    """Find invalid averages: they must be finite and not negative, and zero before the first step.

    Args:
        averages: The saved averages by name.
        phase: The saved phase.

    Yields:
        One line for each invalid tensor.
    """
    for name, average in averages.items():
        if not bool(((average >= 0) & average.isfinite()).all()):
            yield f"{name!r} has negative or non-finite averages"
        elif phase is Phase.WAITING and bool(torch.any(average)):
            yield f"{name!r} has averages, but 'blank' says that no step was averaged"
