"""Hypothesis strategies for methods: configs, from the annotations of their fields, and what an allocator is given."""

import math
from collections.abc import Mapping
from enum import EnumMeta
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import torch
from hypothesis import reject, strategies as st
from hypothesis.strategies import SearchStrategy

from tunerkit.errors import ConfigError
from tunerkit.plugin import AdapterConfig

Config = TypeVar("Config", bound=AdapterConfig)


def configs_of(cls: type[Config], **given: SearchStrategy[Any]) -> SearchStrategy[Config]:
    """Draw valid configs: each field is drawn from its annotation, within its range, and so are the classes inside.

    If checks across fields would discard most draws, pass strategies for single fields::

        configs_of(AdaLoraConfig, init_rank=st.integers(8, 16), target_rank=st.integers(1, 8))

    Args:
        cls: The config class.
        **given: Strategies by field name; they replace the default ones.

    Returns:
        A strategy for instances of ``cls``. Its draws raise `ConfigError` if a field rejects a value that its
        annotation and range allow.
    """
    fields = {str(field.alias): values_of(field) for field in attrs.fields(cls) if field.init}

    @st.composite
    def draw_config(draw: st.DrawFn) -> Config:
        values = draw(st.fixed_dictionaries({**fields, **given}))
        try:
            return cls(**values)
        except ConfigError:
            # Discard a draw only for problems across fields. A field that is wrong by itself is a defect.
            if _wrong_alone(cls, values):
                raise
            reject()

    return draw_config()


@attrs.frozen
class Allocation:
    """What an allocator is given at one step.

    Attributes:
        scores: The score of each rank of each target, ``scores[target][rank]``.
        budget: How many ranks of all targets it may keep.
    """

    scores: tuple[tuple[float, ...], ...]
    budget: int


def allocations(
    *, steps: int = 5, scores: SearchStrategy[float] | None = None, rising: bool = False
) -> SearchStrategy[list[Allocation]]:
    """Draw a sequence of allocations for the same targets, with a budget that falls from step to step.

    The budgets reach from 0 to all ranks, targets may have no rank, and many scores are equal. ``scores`` adds those
    that a broken training gives: ``floats(allow_nan=True)``.

    Args:
        steps: How many allocations at most.
        scores: Scores beside those that are drawn anyway: ties, zeros of both signs, tiny and huge ones.
        rising: Whether the budget rises instead.

    Returns:
        A strategy for lists of one `Allocation` or more.
    """
    hard = st.sampled_from([0.0, -0.0, 1.0, 2.0, 1e-45, 3e38, -1.0])
    each = hard | (st.floats(-10, 10, width=32) if scores is None else scores)

    @st.composite
    def draw_allocations(draw: st.DrawFn) -> list[Allocation]:
        ranks = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
        budgets = draw(st.lists(st.integers(0, sum(ranks)), min_size=1, max_size=steps))
        return [
            Allocation(draw(st.tuples(*(st.tuples(*[each] * rank) for rank in ranks))), budget)
            for budget in sorted(budgets, reverse=not rising)
        ]

    return draw_allocations()


def values_of(field: "attrs.Attribute[Any]") -> SearchStrategy[Any]:
    """Draw valid values of one field.

    Args:
        field: A field of a config class, from ``attrs.fields``.
    """
    return _of(field.type, field.metadata)


def _wrong_alone(cls: type[AdapterConfig], values: Mapping[str, Any]) -> bool:
    """Whether a field is wrong by itself: then building fails even without the checks across fields."""
    body = {"problems": AdapterConfig.problems}
    lenient = attrs.make_class(f"Lenient{cls.__name__}", {}, bases=(cls,), class_body=body, frozen=True)
    try:
        lenient(**values)
    except ConfigError:
        return True
    return False


def _of(cls: Any, limits: Mapping[str, Any]) -> SearchStrategy[Any]:
    members = get_args(cls)
    if get_origin(cls) is Literal:
        return st.sampled_from(members)
    if get_origin(cls) in (Union, UnionType):
        return st.one_of(*(_of(member, limits) for member in members))
    if get_origin(cls) is tuple and Ellipsis not in members:
        return st.tuples(*(_of(member, limits) for member in members))
    if get_origin(cls) in (tuple, list):
        return st.lists(_of(members[0], limits), max_size=4).map(get_origin(cls))
    if get_origin(cls) in (set, frozenset):
        return st.frozensets(_of(members[0], limits), max_size=4).map(get_origin(cls))
    if get_origin(cls) in (dict, Mapping):
        return st.dictionaries(_of(members[0], {}), _of(members[1], limits), max_size=4)
    if isinstance(cls, EnumMeta):
        return st.sampled_from([*cls])
    return _objects(cls) if attrs.has(cls) else _scalar(cls, limits)


def _objects(cls: Any) -> SearchStrategy[Any]:
    """Draw objects of an attrs class inside a config, without those that its own checks refuse."""
    fields = {str(field.alias): values_of(field) for field in attrs.fields(attrs.resolve_types(cls)) if field.init}

    def is_accepted(values: Mapping[str, Any]) -> bool:
        try:
            cls(**values)
        except ValueError:
            return False
        return True

    return st.fixed_dictionaries(fields).filter(is_accepted).map(lambda values: cls(**values))


def _scalar(cls: Any, limits: Mapping[str, Any]) -> SearchStrategy[Any]:
    if cls is NoneType:
        return st.none()
    if cls is bool:
        return st.booleans()
    if cls is str:
        return st.text(max_size=12)
    if cls is Path:  # without half characters, which no file system has
        return st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).map(Path)
    return _ints(limits) if cls is int else _floats(limits)


def _bounds(limits: Mapping[str, Any], lowest: float, highest: float) -> tuple[float, float, bool, bool]:
    """Return the lowest and the highest value, and whether each is excluded; by default what any config accepts."""
    ge, gt, le, lt = (limits.get(name) for name in ("ge", "gt", "le", "lt"))
    low = max((limit for limit in (ge, gt) if limit is not None), default=lowest)
    high = min((limit for limit in (le, lt) if limit is not None), default=highest)
    return low, high, low == gt, high == lt


def _ints(limits: Mapping[str, Any]) -> SearchStrategy[int]:
    low, high, open_below, open_above = _bounds(limits, -(2**63), 2**64 - 1)
    lowest = math.floor(low) + 1 if open_below else math.ceil(low)
    highest = math.ceil(high) - 1 if open_above else math.floor(high)
    return st.nothing() if lowest > highest else st.integers(lowest, highest)


def _floats(limits: Mapping[str, Any]) -> SearchStrategy[float]:
    largest = torch.finfo(torch.float32).max
    low, high, open_below, open_above = _bounds(limits, -largest, largest)
    return st.floats(low, high, exclude_min=open_below, exclude_max=open_above, allow_nan=False)
