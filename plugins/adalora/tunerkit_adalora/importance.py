"""The importance of weights and of triplets: sensitivity, uncertainty, score (section 3.2 of the paper)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunerkit_adalora.averages import Part, Stack


@torch.no_grad()
def smooth_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    stacks: Sequence[Stack],
    *,
    beta1: float,
    beta2: float,
    restart: bool = False,
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

    Returns:
        How many weights were left out; 0-d int64, on the first weight's device.
    """
    if not weights:
        return torch.zeros((), dtype=torch.int64)
    taken = [_smooth_stack_(weights, grads, stack, beta1, beta2, restart) for stack in stacks]
    given = sum(grad is not None and grad.numel() > 0 for grad in grads)
    return given - torch.stack([count.to(weights[0].device) for count in taken]).sum()


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


def _smooth_stack_(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None], stack: Stack, beta1: float, beta2: float, restart: bool
) -> Tensor:
    """`smooth_` for one stack; how many of its weights were averaged, 0-d int64."""
    used = {position: grad for position, index in enumerate(stack.members) if (grad := grads[index]) is not None}
    if not used or not stack.sensitivity.numel():
        return torch.zeros((), dtype=torch.int64, device=stack.sensitivity.device)
    own = [weights[stack.members[position]] for position in used]
    mean, spread = stack.sensitivity, stack.uncertainty
    if len(used) == len(stack.members):
        return _average_(own, list(used.values()), mean, spread, beta1, beta2, restart)
    # Not by an index tensor: the host would wait while it is made on the device.
    means, spreads = mean.unbind(), spread.unbind()
    views = [*(means[position] for position in used), *(spreads[position] for position in used)]
    mean, spread = torch.stack(views[: len(used)]), torch.stack(views[len(used) :])
    taken = _average_(own, list(used.values()), mean, spread, beta1, beta2, restart)
    torch._foreach_copy_(views, [*mean.unbind(), *spread.unbind()])
    return taken


def _average_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mean: Tensor,
    spread: Tensor,
    beta1: float,
    beta2: float,
    restart: bool,
) -> Tensor:
    """Eq. 8-10 for weights of one shape at once; ``mean`` and ``spread`` (count, *shape) are Ī and Ū."""
    current = torch.stack(list(weights)).to(mean.dtype)
    torch._foreach_mul_(list(current.unbind()), list(grads))
    current.abs_()
    # Test I, not the gradient: a bad gradient always shows there (0·∞ is NaN), and so does a product that overflows.
    # I is never negative, so one pass for its largest value is enough: NaN propagates, and is not below infinity.
    finite = current.amax(dim=tuple(range(1, current.ndim)), keepdim=True) < torch.inf
    # What is left out moves by 0 towards the new value: x + 0 · (y − x) is x, bit for bit, if y is finite.
    current.nan_to_num_(nan=0.0, posinf=0.0)
    used = finite.to(mean.dtype)
    if restart:
        forgotten = 1 - used
        mean.mul_(forgotten)
        spread.mul_(forgotten)
    pace = used * (1 - beta1)
    mean.lerp_(current, pace)
    current.sub_(mean).abs_()
    spread.lerp_(current, pace if beta1 == beta2 else used * (1 - beta2))
    return finite.count_nonzero()
