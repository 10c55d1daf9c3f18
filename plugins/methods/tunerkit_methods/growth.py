"""How a budget of ranks grows during training, and which targets its triplets go to."""

from collections import Counter
from collections.abc import Sequence


def growths_by(step: int, total: int, growths: int, until: float) -> int:
    """Count the growths up to a step: at equal distances, the last one after a share of training.

    Args:
        step: The optimizer step.
        total: The length of training in steps.
        growths: How many there are.
        until: The share of training after which there are no more.

    Returns:
        Their number; -1 before the step that only looks where to grow.
    """
    return min(step * (growths + 1) // max(1, int(until * total)), growths + 1) - 1


def spread(scores: Sequence[Sequence[float]], rooms: Sequence[int], due: int) -> Counter[int]:
    """Give each target as many triplets as it has of the largest scores.

    Args:
        scores: The scores of the next triplets of each target, the largest first. Further ones count as 0.
        rooms: How many triplets each target can take.
        due: How many there are to give. All are given if there is room.

    Returns:
        The number of triplets by the target's place. Equal scores go to as many targets as possible, the first first.
    """
    order = (
        (-each[i] if i < len(each) else 0.0, i, place)
        for place, (each, room) in enumerate(zip(scores, rooms, strict=True))
        for i in range(min(room, due))
    )
    return Counter(place for *_, place in sorted(order)[:due])
