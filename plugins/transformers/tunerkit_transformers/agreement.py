"""What the processes of one training tell each other, so that all of them come to the same decision."""

from collections.abc import Sequence
from typing import TypeVar

from torch import distributed

Value = TypeVar("Value")


def gathered(value: Value) -> list[Value]:
    """Return the ``value`` of each process, by its rank. All processes must call this; one process alone sends nothing.

    Args:
        value: What this process tells the others. It is pickled.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [value]
    values: list[Value] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def union(seen: Sequence[Sequence[str]]) -> list[str]:
    """Return what any process has seen, each sentence once. Where not all have seen it, the processes are named.

    Args:
        seen: The sentences of each process, by its rank, as `gathered` returns them.
    """
    sentences = dict.fromkeys(sentence for own in seen for sentence in own)
    ranks = {sentence: [rank for rank, own in enumerate(seen) if sentence in own] for sentence in sentences}
    return [f"{sentence}{_named(ranks[sentence], len(seen))}" for sentence in sentences]


def _named(ranks: Sequence[int], processes: int) -> str:
    if len(ranks) == processes:
        return ""
    shown = ", ".join(map(str, ranks[:5])) + (", ..." if len(ranks) > 5 else "")
    return f" (seen by process {shown} of {processes})"
