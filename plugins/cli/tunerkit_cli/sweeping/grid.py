"""The plan of a sweep, and its settings: each combination of the values that were given, as a recipe of its own."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import attrs

from tunerkit.errors import ConfigError, shown
from tunerkit_cli.recipes import reading, setting
from tunerkit_cli.recipes.recipe import DATA, Recipe

RATE: Final = "training.learning_rate"
_SEEDS: Final = "--seeds says how many seeds each setting has"
_METHODS: Final = "--methods lists the methods to compare"
# What must be the same in all runs: they are compared on the same rows, and each has a folder of its own.
_FIXED: Final[Mapping[str, str]] = {
    **dict.fromkeys((*DATA, "task", "columns", "label_map", "drop_bad_rows"), "all runs are compared on the same rows"),
    "out": "each run has a folder of its own in --out",
    "training.seed": _SEEDS,
    "seed": _SEEDS,
    "method": _METHODS,
}
_PART: Final = re.compile(r""""[^"]*"|'[^']*'|.""", re.DOTALL)
# What changes the size of a method, which --sizes sets.
_OF_SIZE: Final = ("rank", "target_rank", "init_rank", "rank_pattern", "targets", "exclude")


@attrs.frozen(eq=False)
class Plan:
    """A sweep as it began.

    Attributes:
        mapping: The recipe's mapping, without what varies.
        axes: The values of each key that varies, as texts.
        seeds: How many seeds each setting has.
        methods: The methods that are compared; empty if settings are.
        sizes: Their sizes, as ranks of LoRA; empty for those of the recipe.
        contenders: What is compared, as `contenders_of` returns it.
        searches_rates: Whether each method is compared at the best of three rates: the usual one, a third of it, and
            three times as much.
        digests: Those of the files of data, by path, when it began.
    """

    mapping: Mapping[str, Any]
    axes: Mapping[str, Sequence[str]]
    seeds: int
    methods: Sequence[str] = ()
    sizes: Sequence[int] = ()
    contenders: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    searches_rates: bool = False
    digests: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Arm:
    """One combination of values.

    Attributes:
        name: The values by the last part of their keys, such as ``"learning_rate 0.001, rank 4"``.
        contender: The name of what it is a setting of: in a comparison of methods the method and its size, of which
            the best setting counts; else itself.
        group: What it has in common with those that differ from it in their learning rates alone.
        folder: The name of its folder.
        recipe: The recipe with these values.
    """

    name: str
    contender: str
    group: str
    folder: str
    recipe: Recipe

    @property
    def rate(self) -> float | None:
        """The learning rate, if the recipe says it."""
        return self.recipe.training.get("learning_rate")


def axes_of(rates: str | None, settings: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the values of each key that has several, and the settings with one value, as ``--set`` takes them.

    Args:
        rates: The learning rates, separated by commas; None for that of the recipe.
        settings: Texts ``key=value`` or ``key=value,value``; commas inside brackets or quotes separate nothing.

    Raises:
        ConfigError: A text has another form, a key is given twice or must be the same in all runs.
    """
    given = [*([] if rates is None else [f"{RATE}={rates}"]), *settings]
    axes: dict[str, list[str]] = {}
    fixed, problems = [], []
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip()
        found = _parts(values)
        if not equals or not key or not all(found):
            problems.append(f"--set {shown(text)}: expected key=value,value, as in --set config.rank=4,8")
        elif len(found) == 1:
            fixed.append(text)
        elif key in axes or (is_rate(key) and any(map(is_rate, axes))):
            problems.append(f"--set {key}: is given twice; give all values at once, separated by commas")
        elif (why := _FIXED.get(key, _FIXED.get(key.partition(".")[0]))) is not None:
            problems.append(f"--set {key}: cannot have several values, since {why}")
        else:
            axes[key] = found
    if problems:
        raise ConfigError(problems)
    return axes, fixed


def arms_of(
    mapping: Mapping[str, Any],
    axes: Mapping[str, Sequence[str]],
    contenders: Mapping[str, Mapping[str, Any]] = {},
) -> list[Arm]:
    """Return the combinations of values, each with its recipe.

    Args:
        mapping: The recipe's mapping, without the values that vary.
        axes: The values by key, as `axes_of` returns them.
        contenders: What is compared, by name: the method and the settings that give it its size. Each has all
            combinations. Without any, the combinations themselves are compared.

    Raises:
        ConfigError: A value or a key is none of a recipe, nothing varies, or two combinations are the same.
    """
    if not contenders and not axes:
        raise ConfigError(
            ["nothing to compare: give several values, as in --lr 5e-4,1e-3,2e-3, --set config.rank=4,8, or --methods"]
        )
    arms: list[Arm] = []
    known: dict[str, str] = {}
    for whose, given in contenders.items() or [("", {})]:
        own = {**mapping, **given, "config": {**(mapping.get("config") or {}), **given.get("config", {})}}
        for values in itertools.product(*axes.values()):
            pairs = dict(zip(axes, values, strict=True))
            parts = [f"{key.rpartition('.')[2]} {value}" for key, value in pairs.items()]
            name = ", ".join(filter(None, (whose, *parts)))
            group = ", ".join([whose, *(part for key, part in zip(pairs, parts, strict=True) if not is_rate(key))])
            with _naming(whose):
                merged = setting.from_command_line(own, [f"{key}={value}" for key, value in pairs.items()])
            recipe = reading.structure(merged, name)
            if (same := known.setdefault(repr(recipe), name)) != name:
                raise ConfigError([f"{same} and {name} are the same settings; leave one out"])
            plain = re.sub(r"[^\w.+-]+", "-", name)[:80].strip("-.")
            arms.append(Arm(name, whose or name, group, f"{len(arms) + 1:02}-{plain}", recipe))
    return arms


def is_rate(key: str) -> bool:
    """Whether a key is the learning rate."""
    return key in (RATE, RATE.rpartition(".")[2])


def refuse_sizes(axes: Mapping[str, Sequence[str]], fixed: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a value changes what ``--sizes`` sets. ``fixed`` is the config of all methods."""
    keys = [key for key in axes if key.rpartition(".")[2] in _OF_SIZE]
    keys += [f"config.{key}" for key in fixed if key in _OF_SIZE[:4]]
    if keys:
        raise ConfigError([f"{keys[0]}: changes the size of a method, which --sizes sets; leave one of them out"])


@contextmanager
def _naming(whose: str) -> Iterator[None]:
    """Inside the block, errors name the contender that they are of."""
    try:
        yield
    except ConfigError as problem:
        raise ConfigError([f"{whose}: {each}" if whose else each for each in problem.problems]) from None


def rounds(settings: int, seeds: int) -> list[tuple[int, int]]:
    """Return the rounds by which the best setting of a contender is found, by successive halving over seeds.

    The better half of the settings goes on with twice as many seeds (Jamieson and Talwalkar, 2016, with seeds as the
    resource: a training that is cut short favours large rates).

    Args:
        settings: How many settings a contender has.
        seeds: How many seeds the one that is left has in the end.

    Returns:
        For each round, how many settings are in it, and how many seeds each of them then has.
    """
    found, upto = [], 1
    while settings > 1 and upto < seeds:
        found.append((settings, upto))
        settings, upto = math.ceil(settings / 2), min(2 * upto, seeds)
    return [*found, (settings, seeds)]


def _parts(values: str) -> list[str]:
    """Cut a text at its commas, but for those inside brackets or quotes."""
    found, depth = [""], 0
    for each in _PART.findall(values):
        depth += (each in "[{") - (each in "]}")
        if each == "," and depth <= 0:
            found.append("")
        else:
            found[-1] += each
    return [each.strip() for each in found]
