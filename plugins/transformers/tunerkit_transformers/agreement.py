"""Exchange values between all ranks of a training, so that all make the same decision."""

from collections.abc import Sequence
from typing import TypeVar

from torch import distributed

Value = TypeVar("Value")


def gathered(value: Value) -> list[Value]:
    """Return the values of all ranks, in rank order. All ranks must call this; a single process sends nothing.

    Args:
        value: This rank's value. It is pickled.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [value]
    values: list[Value] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def union(seen: Sequence[Sequence[str]]) -> list[str]:
    """Return each distinct sentence once, followed by its ranks unless all ranks have it.

    Args:
        seen: The sentences of each rank, as `gathered` returns them.
    """
    sentences = dict.fromkeys(sentence for own in seen for sentence in own)
    ranks = {sentence: [rank for rank, own in enumerate(seen) if sentence in own] for sentence in sentences}
    return [f"{sentence}{_named(ranks[sentence], len(seen))}" for sentence in sentences]


def _named(ranks: Sequence[int], processes: int) -> str:
    if len(ranks) == processes:
        return ""
    shown = ", ".join(map(str, ranks[:5])) + (", ..." if len(ranks) > 5 else "")
    return f" (seen by process {shown} of {processes})"
