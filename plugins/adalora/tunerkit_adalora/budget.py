"""The budget over the targets: what a triplet costs, what is live, and what the config allows."""

from collections.abc import Sequence

from tunerkit import ConfigError, Target
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.schedule import Schedule, plan
from tunerkit_adalora.svd_layer import SvdLayer


def schedule_of(config: AdaLoraConfig, layers: Sequence[SvdLayer], total_steps: int) -> Schedule:
    """The schedule as the config alone describes it, in the config's budget unit."""
    once = sum(costs_of(config, layers))  # a triplet at each target
    initial = config.initial_rank * once
    target = config.budget if config.budget is not None else config.average_rank * once
    target_field = "target_rank" if config.budget is None else "budget"
    return plan(
        total_steps=total_steps,
        t_init=config.t_init,
        t_final=config.t_final,
        delta_t=config.delta_t,
        initial=initial,
        target=target,
        target_field=target_field,
    )


def live_budget(config: AdaLoraConfig, layers: Sequence[SvdLayer]) -> int:
    """What the masks keep, in the config's budget unit."""
    return sum(layer.rank * cost for layer, cost in zip(layers, costs_of(config, layers), strict=True))


def costs_of(config: AdaLoraConfig, layers: Sequence[SvdLayer]) -> list[int]:
    """What one triplet of each layer costs: 1, or its number of parameters."""
    if config.budget_unit == "rank":
        return [1] * len(layers)
    return [layer.p.shape[0] + layer.q.shape[1] + 1 for layer in layers]


def check_bounds(
    config: AdaLoraConfig, targets: Sequence[Target], layers: Sequence[SvdLayer], target_budget: int
) -> None:
    """Refuse minimum and maximum ranks that the final budget cannot meet, and patterns that match no target."""
    paths = [target.path for target in targets]
    costs = costs_of(config, layers)
    least = sum(config.minimum_at(path) * cost for path, cost in zip(paths, costs, strict=True))
    most = sum(config.maximum_at(path) * cost for path, cost in zip(paths, costs, strict=True))
    problems = [
        f"minimum {config.minimum_at(path)} is above maximum {most_at} at {path} @ $.min_rank"
        for path, layer in zip(paths, layers, strict=True)
        if config.minimum_at(path) > (most_at := min(config.maximum_at(path), len(layer.lam)))
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
