"""The budget over the targets: costs of triplets, live triplets, and the config's limits."""

from collections.abc import Mapping, Sequence
from operator import attrgetter, mul

import attrs

from tunerkit.plugin import ConfigError, Target, lookup
from tunerkit_adalora.config import AdaLoraConfig, Resolved
from tunerkit_adalora.schedule import Schedule, plan
from tunerkit_adalora.svd_layer import SvdLayer

_RANK, _MATRICES = attrgetter("rank"), attrgetter("matrices")


@attrs.frozen
class Bounds:
    """The minimum and maximum number of triplets of each target, in the order of the targets.

    For a stack of matrices, of each of its matrices.
    """

    minimum: tuple[int, ...]
    maximum: tuple[int, ...]


def schedule_of(
    config: AdaLoraConfig, resolved: Resolved, layers: Sequence[SvdLayer], costs: Sequence[int], total_steps: int
) -> Schedule:
    """Build the budget schedule from the config.

    Args:
        config: The config.
        resolved: The config's resolved settings.
        layers: The layers at all targets.
        costs: The cost of one triplet of each layer.
        total_steps: T, in optimizer steps.

    Returns:
        The schedule, with budgets in the config's unit.

    Raises:
        ConfigError: If the schedule is impossible.
    """
    per_rank = sum(map(mul, map(_MATRICES, layers), costs))  # one triplet of each matrix
    target = resolved.target_rank * per_rank if config.budget is None else config.budget
    return plan(
        total_steps=total_steps,
        t_init=config.t_init,
        t_final=config.t_final,
        delta_t=config.delta_t,
        initial=resolved.init_rank * per_rank,
        target=target,
        prunes=live_budget(layers, costs) > target,
        target_field="target_rank" if config.budget is None else "budget",
    )


def live_budget(layers: Sequence[SvdLayer], costs: Sequence[int]) -> int:
    """Return the total cost of the live triplets; ``costs`` has the cost of one triplet of each layer."""
    return sum(map(mul, map(_RANK, layers), costs))


def costs_of(config: AdaLoraConfig, layers: Sequence[SvdLayer]) -> list[int]:
    """Return the cost of one triplet of each layer.

    Args:
        config: The config, which sets the unit.
        layers: The layers.

    Returns:
        1 for each layer if the unit is a rank, else the number of parameters of one triplet.
    """
    if config.budget_unit == "rank":
        return [1] * len(layers)
    return [layer.p.shape[-2] + layer.q.shape[-1] + 1 for layer in layers]


def bounds_of(config: AdaLoraConfig, resolved: Resolved, targets: Sequence[Target]) -> Bounds:
    """Look up the minimum and maximum rank of each target.

    Args:
        config: The config, with one number for all targets, or a number by target pattern.
        resolved: The config's resolved settings. Without a maximum, the initial rank is the maximum.
        targets: The targets.

    Returns:
        The bounds, in triplets.
    """
    greatest = resolved.init_rank if config.max_rank is None else config.max_rank
    return Bounds(
        minimum=_at_each(targets, config.min_rank, 0),
        maximum=_at_each(targets, greatest, resolved.init_rank),
    )


def _at_each(targets: Sequence[Target], bound: int | Mapping[str, int], default: int) -> tuple[int, ...]:
    if isinstance(bound, int):
        return (bound,) * len(targets)
    return tuple(lookup(bound, target.path, default) for target in targets)


def check_bounds(
    config: AdaLoraConfig,
    bounds: Bounds,
    targets: Sequence[Target],
    layers: Sequence[SvdLayer],
    costs: Sequence[int],
    target_budget: int,
) -> None:
    """Refuse minimum and maximum ranks that the final budget cannot meet.

    Args:
        config: The config.
        bounds: The bounds of each target.
        targets: The targets, for messages.
        layers: The layer at each target.
        costs: The cost of one triplet of each layer.
        target_budget: b(T), in the config's unit.

    Raises:
        ConfigError: With one line for each problem.
    """
    of_each = list(map(mul, map(_MATRICES, layers), costs))
    least, most = sum(map(mul, bounds.minimum, of_each)), sum(map(mul, bounds.maximum, of_each))
    problems = [
        f"minimum {low} is above maximum {high_at} at {target.path} @ $.min_rank"
        for target, layer, low, high in zip(targets, layers, bounds.minimum, bounds.maximum, strict=True)
        if low > (high_at := min(high, layer.lam.shape[-1]))
    ]
    if target_budget < min(costs):
        problems.append(
            f"a budget of {target_budget} parameters buys no triplet: the cheapest costs {min(costs)}; raise it "
            "@ $.budget"
        )
    if least > target_budget:
        problems.append(
            f"the minimum ranks need {least}, but the final budget is {target_budget}; lower min_rank or raise the "
            "budget @ $.min_rank"
        )
    if config.budget_unit == "rank" and most < target_budget:
        problems.append(
            f"the maximum ranks admit {most}, but the final budget is {target_budget}; raise max_rank or lower the "
            "budget @ $.max_rank"
        )
    if problems:
        raise ConfigError(problems)
