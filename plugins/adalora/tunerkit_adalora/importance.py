"""The importance of weights and of triplets: sensitivity, uncertainty, score (section 3.2 of the paper).

Lists of weights hold P (out, r), λ (r,) and Q (r, in) of the first SVD layer, then of the second, and so on. Weights
of one shape are averaged as one tensor, so that the number of operations goes by shapes and not by layers.
"""

from collections import defaultdict
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

_PARTS = 3


@attrs.frozen(eq=False)
class Stack:
    """The running averages Ī and Ū (Eq. 9, 10) of weights of one shape, (count, *shape).

    ``members`` are the weights' places in the list of all. They are the same part (P, λ or Q) of different layers.
    """

    members: tuple[int, ...]
    sensitivity: Tensor
    uncertainty: Tensor

    @property
    def part(self) -> int:
        """0 for P, 1 for λ, 2 for Q."""
        return self.members[0] % _PARTS


def new_stacks(weights: Sequence[Tensor]) -> list[Stack]:
    """Averages before the first step: zeros, in fp32 or wider.

    A score is a product of two averages of small numbers; in fp16 it underflows and everything looks unimportant.
    """
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, weight in enumerate(weights):
        groups[place % _PARTS, weight.shape, weight.dtype, weight.device].append(place)
    stacks = []
    for members in groups.values():
        like = weights[members[0]]
        wide = torch.promote_types(like.dtype, torch.float32)
        zeros = [torch.zeros((len(members), *like.shape), dtype=wide, device=like.device) for _ in range(2)]
        stacks.append(Stack(tuple(members), *zeros))
    return stacks


def unstack(stacks: Sequence[Stack]) -> tuple[list[Tensor], list[Tensor]]:
    """Ī and Ū of each weight in the order of the list, as views that may be written to."""
    sensitivity: dict[int, Tensor] = {}
    uncertainty: dict[int, Tensor] = {}
    for stack in stacks:
        sensitivity.update(zip(stack.members, stack.sensitivity.unbind(), strict=True))
        uncertainty.update(zip(stack.members, stack.uncertainty.unbind(), strict=True))
    return [sensitivity[i] for i in range(len(sensitivity))], [uncertainty[i] for i in range(len(uncertainty))]


@torch.no_grad()
def smooth_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    stacks: Sequence[Stack],
    *,
    beta1: float,
    beta2: float,
    anew: bool = False,
) -> Tensor:
    """Update the running averages in place with a step's weights and gradients.

    Eq. 8:  I = |w · ∂L/∂w|;  Eq. 9:  Ī ← β1 Ī + (1 − β1) I;  Eq. 10:  U = |I − Ī|,  Ū ← β2 Ū + (1 − β2) U,
    with the new Ī in Eq. 10.

    With ``anew`` Ī and Ū count as 0 before. A weight without a gradient keeps its averages. So does one whose I isn't
    finite throughout: it is left out as a whole. Returns how many were left out, as a 0-d int64 tensor on the first
    weight's device; nothing here waits for the device.
    """
    if not weights:
        return torch.zeros((), dtype=torch.int64)
    taken = [_smooth_stack_(weights, grads, stack, beta1, beta2, anew) for stack in stacks]
    given = sum(grad is not None and grad.numel() > 0 for grad in grads)
    return given - torch.stack([count.to(weights[0].device) for count in taken]).sum()


def triplet_scores(stacks: Sequence[Stack]) -> list[Tensor]:
    """The score of each triplet, (r,) for each layer: s(λ_i) + mean s(P_·i) + mean s(Q_i·), s = Ī·Ū (Eq. 11-13).

    Views of one tensor, on the device of the first stack.
    """
    if not stacks:
        return []
    rows: dict[int, Tensor] = {}
    for stack in stacks:
        score = stack.sensitivity * stack.uncertainty
        if stack.part != 1:
            score = score.mean(dim=1 if stack.part == 0 else 2)
        rows.update(zip(stack.members, score.to(stacks[0].sensitivity.device).unbind(), strict=True))
    p, lam, q = (torch.cat([rows[place] for place in range(part, len(rows), _PARTS)]) for part in range(_PARTS))
    return list(torch.split(lam + (p + q), [len(rows[place]) for place in range(0, len(rows), _PARTS)]))


def _smooth_stack_(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None], stack: Stack, beta1: float, beta2: float, anew: bool
) -> Tensor:
    """One stack of `smooth_`; how many of its weights were averaged, 0-d int64."""
    slopes = {row: grad for row, place in enumerate(stack.members) if (grad := grads[place]) is not None}
    if not slopes or not stack.sensitivity.numel():
        return torch.zeros((), dtype=torch.int64, device=stack.sensitivity.device)
    used = [weights[stack.members[row]] for row in slopes]
    means, spreads = stack.sensitivity, stack.uncertainty
    if len(slopes) == len(stack.members):
        return _average_(used, list(slopes.values()), means, spreads, beta1, beta2, anew)
    # By rows and not by an index: making one on the device would be waited for.
    rows = [[average[row] for row in slopes] for average in (list(means.unbind()), list(spreads.unbind()))]
    mean, spread = torch.stack(rows[0]), torch.stack(rows[1])
    taken = _average_(used, list(slopes.values()), mean, spread, beta1, beta2, anew)
    torch._foreach_copy_([*rows[0], *rows[1]], [*mean.unbind(), *spread.unbind()])
    return taken


def _average_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mean: Tensor,
    spread: Tensor,
    beta1: float,
    beta2: float,
    anew: bool,
) -> Tensor:
    """Eq. 8-10 for weights of one shape at once; ``mean`` and ``spread`` (count, *shape) are Ī and Ū."""
    current = torch.stack(list(weights)).to(mean.dtype)
    torch._foreach_mul_(list(current.unbind()), list(grads))
    current.abs_()
    # Asked of I and not of the gradient: a bad gradient always shows there (0·∞ is NaN), and so does an overflow of the
    # product. I is never negative, so its largest value says it in one pass: NaN passes through it and is no less.
    finite = current.amax(dim=tuple(range(1, current.ndim)), keepdim=True) < torch.inf
    # What is left out moves by 0 towards what is there: x + 0 · (y − x) is x, bit for bit, if only y is finite.
    current.nan_to_num_(nan=0.0, posinf=0.0)
    used = finite.to(mean.dtype)
    if anew:
        forgotten = 1 - used
        mean.mul_(forgotten)
        spread.mul_(forgotten)
    pace = used * (1 - beta1)
    mean.lerp_(current, pace)
    current.sub_(mean).abs_()
    spread.lerp_(current, pace if beta1 == beta2 else used * (1 - beta2))
    return finite.count_nonzero()
