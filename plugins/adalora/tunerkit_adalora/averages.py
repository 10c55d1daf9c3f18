"""The running averages of importance, Ī and Ū, with weights of one shape in one tensor.

Flat lists of weights contain P (out, r), λ (r,) and Q (r, in) of the first layer, then of the second, and so on.
Weights of one shape are averaged together. So the number of operations scales with the number of distinct shapes, not
of layers.
"""

from collections import defaultdict
from collections.abc import Sequence
from enum import IntEnum

import attrs
import torch
from torch import Tensor


class Part(IntEnum):
    """Which of a layer's three weights; the value is its position among them."""

    P = 0
    LAM = 1
    Q = 2


@attrs.frozen(eq=False)
class Stack:
    """The running averages Ī and Ū (Eq. 9, 10) of weights of one shape.

    Attributes:
        members: Indices of the weights in the flat list. All are the same part of different layers.
        sensitivity: Ī, (count, *shape).
        uncertainty: Ū, (count, *shape).
    """

    members: tuple[int, ...]
    sensitivity: Tensor
    uncertainty: Tensor

    @property
    def part(self) -> Part:
        """Whether the weights are P, λ or Q."""
        return _part_of(self.members[0])


def new_stacks(weights: Sequence[Tensor]) -> list[Stack]:
    """Make the averages before the first step: zeros, in `average_dtype`.

    Args:
        weights: The flat list.

    Returns:
        One stack for each part, shape, dtype and device.
    """
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, weight in enumerate(weights):
        groups[_part_of(index), weight.shape, weight.dtype, weight.device].append(index)
    stacks = []
    for members in groups.values():
        like = weights[members[0]]
        wide = average_dtype(like.dtype)
        zeros = [torch.zeros((len(members), *like.shape), dtype=wide, device=like.device) for _ in range(2)]
        stacks.append(Stack(tuple(members), *zeros))
    return stacks


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the averages of weights of ``dtype``: fp32 or wider.

    A score is a product of two averages of small numbers. In fp16 it would underflow, and every triplet would look
    unimportant.
    """
    return torch.promote_types(dtype, torch.float32)


def unstack(stacks: Sequence[Stack]) -> tuple[list[Tensor], list[Tensor]]:
    """Take the stacks apart.

    Args:
        stacks: The averages.

    Returns:
        Ī and Ū of each weight in the order of the flat list, as views that may be written to.
    """
    sensitivity: dict[int, Tensor] = {}
    uncertainty: dict[int, Tensor] = {}
    for stack in stacks:
        sensitivity.update(zip(stack.members, stack.sensitivity.unbind(), strict=True))
        uncertainty.update(zip(stack.members, stack.uncertainty.unbind(), strict=True))
    return [sensitivity[i] for i in range(len(sensitivity))], [uncertainty[i] for i in range(len(uncertainty))]


def on_devices_of(weights: Sequence[Tensor], stacks: list[Stack]) -> list[Stack]:
    """Move the averages to their weights: after attaching, a model may be moved, or spread over devices.

    Args:
        weights: The flat list.
        stacks: The averages.

    Returns:
        The same stacks if no weight has moved, else new ones with the same values.
    """
    if all(weights[index].device == stack.sensitivity.device for stack in stacks for index in stack.members):
        return stacks
    moved = new_stacks(weights)
    for new, old in zip(unstack(moved), unstack(stacks), strict=True):
        for average, value in zip(new, old, strict=True):
            average.copy_(value)
    return moved


def _part_of(index: int) -> Part:
    return Part(index % len(Part))
