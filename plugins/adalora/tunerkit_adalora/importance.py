"""The importance of weights and of triplets: sensitivity, uncertainty, score (section 3.2 of the paper).

Flat lists of weights contain P (out, r), λ (r,) and Q (r, in) of the first layer, then of the second, and so on.
Weights of one shape are averaged together, in one tensor. So the number of operations scales with the number of
distinct shapes, not of layers.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import IntEnum
from operator import attrgetter

import attrs
import torch
from torch import Tensor

# Not by a comprehension: each step asks all weights.
_DEVICE = attrgetter("device")
# Up to here, copying gradients into one tensor takes less time than multiplying by each.
_SMALL = 1 << 20


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
    devices = {*map(_DEVICE, weights), *(stack.sensitivity.device for stack in stacks)}
    if len(devices) == 1 or all(
        weights[index].device == stack.sensitivity.device for stack in stacks for index in stack.members
    ):
        return stacks
    moved = new_stacks(weights)
    for new, old in zip(unstack(moved), unstack(stacks), strict=True):
        for average, value in zip(new, old, strict=True):
            average.copy_(value)
    return moved


def _part_of(index: int) -> Part:
    return Part(index % len(Part))


@torch.no_grad()
def smooth_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    stacks: Sequence[Stack],
    *,
    beta1: float,
    beta2: float,
    restart: bool = False,
    total_: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Update the running averages in place with a step's weights and gradients.

    Eq. 8:  I = |w · ∂L/∂w|;  Eq. 9:  Ī ← β1 Ī + (1 − β1) I;  Eq. 10:  U = |I − Ī|,  Ū ← β2 Ū + (1 − β2) U,
    with the new Ī in Eq. 10.

    A weight without a gradient keeps its averages. So does a weight whose I is not finite throughout: it is left out
    as a whole. Nothing here waits for the device.

    Args:
        weights: P (out, r), λ (r,), Q (r, in) of the first layer, then of the second, and so on.
        grads: Their gradients.
        stacks: Their averages, from `new_stacks`.
        beta1: β1.
        beta2: β2.
        restart: Take Ī and Ū for 0 before this step.
        total_: Adds up a vector over the processes, if each holds only pieces of the weights: a weight is left out in
            all of them if any piece is not finite. None if the weights are whole.

    Returns:
        How many weights were left out; 0-d int64, on the first weight's device.
    """
    if not weights:
        return torch.zeros((), dtype=torch.int64)
    if total_ is not None:
        return _smooth_pieces_(weights, grads, stacks, beta1, beta2, restart, total_)
    left_out = [_smooth_stack_(weights, grads, stack, beta1, beta2, restart) for stack in stacks]
    return torch.stack([count.to(weights[0].device) for count in left_out]).sum()


def triplet_scores(stacks: Sequence[Stack]) -> list[Tensor]:
    """Score each triplet: s(λ_i) + mean s(P_·i) + mean s(Q_i·), with s = Ī·Ū (Eq. 11-13).

    Args:
        stacks: The averages of all layers.

    Returns:
        One tensor (r,) for each layer: views of one tensor, on the device of the first stack.
    """
    if not stacks:
        return []
    device = stacks[0].sensitivity.device
    scores: dict[Part, dict[int, Tensor]] = {part: {} for part in Part}
    for stack in stacks:
        score = stack.sensitivity * stack.uncertainty
        if stack.part is Part.P:
            score = score.mean(dim=1)
        elif stack.part is Part.Q:
            score = score.mean(dim=2)
        scores[stack.part].update(zip(stack.members, score.to(device).unbind(), strict=True))
    of_layers = {part: [found[index] for index in sorted(found)] for part, found in scores.items()}
    p, lam, q = (torch.cat(of_layers[part]) for part in Part)
    return list(torch.split(lam + (p + q), [len(score) for score in of_layers[Part.LAM]]))


def _smooth_pieces_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    stacks: Sequence[Stack],
    beta1: float,
    beta2: float,
    restart: bool,
    total_: Callable[[Tensor], None],
) -> Tensor:
    """`smooth_` for pieces: first, all processes find out together which weights to leave out."""
    # In the order of the weights: the pieces of another process have other shapes, and form other stacks.
    bad = torch.zeros(len(weights), device=weights[0].device)
    views = bad.unbind()
    for stack in stacks:
        _note_bad_(views, weights, grads, stack)
    total_(bad)
    finite = (bad == 0).unbind()
    for stack in stacks:
        own = torch.stack([finite[index] for index in stack.members]).to(stack.sensitivity.device)
        _smooth_stack_(weights, grads, stack, beta1, beta2, restart, own)
    return bad.count_nonzero()


def _note_bad_(bad: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor | None], stack: Stack) -> None:
    """Set ``bad``, 0-d for each weight, to 1 for those of a stack whose I is not finite throughout."""
    used = {index: grad for index in stack.members if (grad := grads[index]) is not None}
    if used and stack.sensitivity.numel():
        current = _importance([weights[index] for index in used], list(used.values()), stack.sensitivity.dtype)
        flags = _is_finite(current).flatten().logical_not().to(bad[0])
        torch._foreach_copy_([bad[index] for index in used], list(flags.unbind()))


def _smooth_stack_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    stack: Stack,
    beta1: float,
    beta2: float,
    restart: bool,
    finite: Tensor | None = None,
) -> Tensor:
    """`smooth_` for one stack; how many of its weights were left out, 0-d int64.

    ``finite`` says which weights to average, bool (count,); None to find out.
    """
    mean, spread = stack.sensitivity, stack.uncertainty
    found = [grads[index] for index in stack.members]
    used = [position for position, grad in enumerate(found) if grad is not None]
    if not used or not mean.numel():
        return torch.zeros((), dtype=torch.int64, device=mean.device)
    own = [weights[stack.members[position]] for position in used]
    given = [grad for grad in found if grad is not None]
    if len(used) == len(found):
        return len(used) - _average_(own, given, mean, spread, beta1, beta2, restart, finite)
    # Not by an index tensor: the host would wait while it is made on the device.
    means, spreads = mean.unbind(), spread.unbind()
    views = [*(means[position] for position in used), *(spreads[position] for position in used)]
    mean, spread = torch.stack(views[: len(used)]), torch.stack(views[len(used) :])
    some = None if finite is None else torch.stack([finite.unbind()[position] for position in used])
    taken = _average_(own, given, mean, spread, beta1, beta2, restart, some)
    torch._foreach_copy_(views, [*mean.unbind(), *spread.unbind()])
    return len(used) - taken


def _average_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mean: Tensor,
    spread: Tensor,
    beta1: float,
    beta2: float,
    restart: bool,
    given: Tensor | None,
) -> Tensor:
    """Eq. 8-10 for weights of one shape at once; ``mean`` and ``spread`` (count, *shape) are Ī and Ū.

    ``given`` says which of them are finite in all processes, bool (count,); None to find out.
    """
    current = _importance(weights, grads, mean.dtype)
    finite = _is_finite(current) if given is None else given.view(-1, *(1 for _ in current.shape[1:]))
    # What is left out moves by 0 towards the new value: x + 0 · (y − x) is x, bit for bit, if y is finite.
    current.nan_to_num_(nan=0.0, posinf=0.0)
    if restart:
        left_out = finite.logical_not()
        mean.mul_(left_out)
        spread.mul_(left_out)
    pace = _pace(finite, beta1, mean.dtype)
    mean.lerp_(current, pace)
    current.sub_(mean).abs_()
    spread.lerp_(current, pace if beta1 == beta2 else _pace(finite, beta2, mean.dtype))
    return finite.count_nonzero()


def _pace(used: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """1 − β for each weight that is averaged, 0 for the others. In the default dtype it takes one operation."""
    return used * (1 - beta) if dtype == torch.get_default_dtype() else used.to(dtype) * (1 - beta)


def _importance(weights: Sequence[Tensor], grads: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """I = |w · ∂L/∂w| (Eq. 8) of weights of one shape, (count, *shape)."""
    current = torch.stack(list(weights)).to(dtype)
    if current.numel() <= _SMALL:
        return current.mul_(torch.stack(list(grads))).abs_()
    torch._foreach_mul_(list(current.unbind()), list(grads))
    return current.abs_()


def _is_finite(importance: Tensor) -> Tensor:
    """Whether I is finite throughout, for each weight: bool (count, 1, ...).

    Test I, not the gradient: a bad gradient always shows there (0·∞ is NaN), and so does a product that overflows. I is
    never negative, so one pass for its largest value is enough: NaN propagates, and is not below infinity.
    """
    largest: Tensor = importance.amax(dim=tuple(range(1, importance.ndim)), keepdim=True)
    return largest < torch.inf
