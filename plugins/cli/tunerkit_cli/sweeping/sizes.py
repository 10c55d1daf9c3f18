"""Settings that give methods equal sizes: as many parameters in adapters as LoRA of a rank has."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from tunerkit import TunerkitError, hooks
from tunerkit.errors import ConfigError

_NEAR: Final = 0.1  # sizes that differ by no more are called equal
_REFERENCE: Final = "lora"
_MOST: Final = 4096  # the greatest rank that is tried
_OTHER_SIZES: Final = 64  # up to which a size that all methods can share is looked for

# (method, settings) -> how many parameters its adapters have in the model.
Count = Callable[[str, Mapping[str, Any]], int]


def contenders_of(
    methods: Sequence[str], sizes: Sequence[int], config: Mapping[str, Any], count: Count
) -> dict[str, dict[str, Any]]:
    """Return what is compared, by name: each method at each size, as a recipe's ``method`` and ``config``.

    Args:
        methods: The methods' names.
        sizes: The ranks of LoRA that has as many parameters. None: each method has its own default size.
        config: The settings that all methods have, such as ``targets``.
        count: Counts the parameters of adapters in the model that is trained.

    Returns:
        A method with a budget, such as AdaLoRA, ends with a mean rank of the size; others have the rank, or whatever
        size they have, that comes closest, at most a tenth away.

    Raises:
        ConfigError: A method has no size, or two methods cannot share one; it names the smallest that all can share.
    """
    names = [hooks.registry.named(each) for each in methods]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError([f"--methods: {twice[0]} is given twice; name each method once"])
    if again := sorted({size for size in sizes if list(sizes).count(size) > 1}):
        raise ConfigError([f"--sizes: {again[0]} is given twice; name each size once"])
    if not sizes:
        return {name: {"method": name, "config": {}} for name in names}
    found: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for size in sizes:
        for name in names:
            settings = _settings(name, size, config, count)
            if isinstance(settings, str):
                problems.append(settings)
            else:
                found[f"{name} of size {size}"] = {"method": name, "config": settings}
    if problems:
        raise ConfigError([*problems, *_shared(names, max(sizes), config, count)])
    return found


def _settings(name: str, size: int, config: Mapping[str, Any], count: Count) -> dict[str, Any] | str:
    """Return the settings of a method that give it a size, or why none do."""
    fields = {field.name for field in attrs.fields(hooks.registry.get(name).config)}
    if "target_rank" in fields:  # by definition: the mean rank that is left
        return {"target_rank": size, **({"budget_unit": "parameters"} if "budget_unit" in fields else {})}
    if "rank" not in fields:
        return f"--sizes: {name} has no rank, so it cannot be given a size; compare it without --sizes"
    shared = {key: config[key] for key in ("targets", "exclude", "train_modules") if key in config}
    wanted = count(_REFERENCE, {**shared, "rank": size})
    if name == _REFERENCE:
        return {"rank": size}
    tried = {rank: number for rank, number in _ranks(name, wanted, config, count)}
    if not tried:
        return f"--sizes: {name} takes no rank in this model; leave it out"
    rank = min(tried, key=lambda each: abs(tried[each] - wanted))
    if abs(tried[rank] - wanted) <= _NEAR * wanted:
        return {"rank": rank}
    return (
        f"--sizes {size}: LoRA then has {wanted:,} parameters, and {name} has no rank with about as many: at rank "
        f"{rank} it has {tried[rank]:,}"
    )


def _ranks(name: str, wanted: int, config: Mapping[str, Any], count: Count) -> Iterator[tuple[int, int]]:
    """Yield ranks with the parameters that they give: powers of two, and then by bisection between the last two."""

    def number(rank: int) -> int | None:
        try:
            return count(name, {**config, "rank": rank})
        except TunerkitError:  # such as a rank greater than the layer
            return None

    rank = 1
    while rank <= _MOST and (found := number(rank)) is not None:
        yield rank, found
        if found >= wanted:
            break
        rank *= 2
    low, high = rank // 2 + 1, rank - 1
    while low <= high:
        middle = (low + high) // 2
        found = number(middle)
        if found is not None:
            yield middle, found
        if found is None or found > wanted:
            high = middle - 1
        else:
            low = middle + 1


def _shared(names: Sequence[str], above: int, config: Mapping[str, Any], count: Count) -> Iterator[str]:
    """Say which size all methods can share, if any."""
    for size in range(1, _OTHER_SIZES + 1):
        if not any(isinstance(_settings(name, size, config, count), str) for name in names):
            yield f"the smallest size that {', '.join(names)} can share is {size}"
            return
