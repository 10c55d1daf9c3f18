"""The budget over the targets: what a triplet costs, what is live, and what the config allows."""

from collections.abc import Mapping, Sequence

import attrs

from tunerkit.plugin import ConfigError, Target, lookup
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.resolved import Resolved
from tunerkit_adalora.schedule import Schedule, plan
from tunerkit_adalora.svd_layer import SvdLayer


@attrs.frozen
class Bounds:
    """The fewest and the most triplets of each target at the end, in the order of the targets."""

    minimum: tuple[int, ...]
    maximum: tuple[int, ...]


def schedule_of(config: AdaLoraConfig, resolved: Resolved, layers: Sequence[SvdLayer], total_steps: int) -> Schedule:
    """Lay out the schedule as the config alone describes it.

    Args:
        config: The config.
        resolved: Its resolved settings.
        layers: The layers at all targets.
        total_steps: T, in optimizer steps.

    Returns:
        The schedule, with budgets in the config's unit.

    Raises:
        ConfigError: If the schedule is impossible.
    """
    per_rank = sum(costs_of(config, layers))  # one triplet at each target
    target = resolved.target_rank * per_rank if config.budget is None else config.budget
    return plan(
        total_steps=total_steps,
        t_init=config.t_init,
        t_final=config.t_final,
        delta_t=config.delta_t,
        initial=resolved.init_rank * per_rank,
        target=target,
        prunes=live_budget(config, layers) > target,
        target_field="target_rank" if config.budget is None else "budget",
    )


def live_budget(config: AdaLoraConfig, layers: Sequence[SvdLayer]) -> int:
    """Add up what the masks keep.

    Args:
        config: The config, whose unit the budget is in.
        layers: The layers.

    Returns:
        Live triplets, or their parameters.
    """
    return sum(layer.rank * cost for layer, cost in zip(layers, costs_of(config, layers), strict=True))


def costs_of(config: AdaLoraConfig, layers: Sequence[SvdLayer]) -> list[int]:
    """Say what one triplet of each layer costs.

    Args:
        config: The config, whose unit the cost is in.
        layers: The layers.

    Returns:
        1 per layer, or a triplet's number of parameters there.
    """
    if config.budget_unit == "rank":
        return [1] * len(layers)
    return [layer.p.shape[0] + layer.q.shape[1] + 1 for layer in layers]


def bounds_of(config: AdaLoraConfig, resolved: Resolved, targets: Sequence[Target]) -> Bounds:
    """Look up the least and the greatest rank of each target.

    Args:
        config: The config, which gives one number for all targets, or target patterns.
        resolved: Its resolved settings; without a maximum the initial rank bounds.
        targets: The targets.

    Returns:
        The bounds, in triplets.
    """
    greatest = resolved.init_rank if config.max_rank is None else config.max_rank
    return Bounds(
        minimum=tuple(_at(target.path, config.min_rank, 0) for target in targets),
        maximum=tuple(_at(target.path, greatest, resolved.init_rank) for target in targets),
    )


def _at(path: str, bound: int | Mapping[str, int], default: int) -> int:
    return lookup(bound, path, default) if isinstance(bound, Mapping) else bound


def check_bounds(
    config: AdaLoraConfig, bounds: Bounds, targets: Sequence[Target], layers: Sequence[SvdLayer], target_budget: int
) -> None:
    """Refuse minimum and maximum ranks that the final budget cannot meet.

    Args:
        config: The config.
        bounds: Its bounds at the targets.
        targets: The targets, named in the errors.
        layers: Their layers.
        target_budget: b(T), in the config's unit.

    Raises:
        ConfigError: With one line for each problem.
    """
    costs = costs_of(config, layers)
    least = sum(rank * cost for rank, cost in zip(bounds.minimum, costs, strict=True))
    most = sum(rank * cost for rank, cost in zip(bounds.maximum, costs, strict=True))
    problems = [
        f"minimum {low} is above maximum {high_at} at {target.path} @ $.min_rank"
        for target, layer, low, high in zip(targets, layers, bounds.minimum, bounds.maximum, strict=True)
        if low > (high_at := min(high, len(layer.lam)))
    ]
    if target_budget < min(costs):
        problems.append(
            f"{target_budget} parameters buy no triplet, the cheapest costs {min(costs)}; raise it @ $.budget"
        )
    if least > target_budget:
        problems.append(
            f"the minimum ranks need {least}, the final budget is {target_budget}; lower them or raise it @ $.min_rank"
        )
    if config.budget_unit == "rank" and most < target_budget:
        problems.append(
            f"the maximum ranks admit {most}, the final budget is {target_budget}; raise them or lower it @ $.max_rank"
        )
    if problems:
        raise ConfigError(problems)
