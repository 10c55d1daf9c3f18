"""The SVD of ΔW at an allocation: exact, where the orthogonality regulariser only pulls P and Q towards it."""

from collections import defaultdict
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from tunerkit_adalora.svd_layer import SvdLayer

# Of the greatest λ of a layer. At 0 a triplet would never move again: the gradients of P and Q would be 0.
_LEAST_SHARE = 1e-4
# What optimizers call a second copy of the weights in their state: ASGD, schedule-free ones, Prodigy, D-Adaptation,
# Lookahead, those with weights in full precision. An average of gradients is no such thing: a step forgets it.
_COPIES = frozenset({"ax", "z", "p0", "x0", "slow_buffer", "slow_params", "master_param", "master_weights"})


@torch.no_grad()
def to_svd_form_(layers: Sequence[SvdLayer], *, total: float) -> None:
    """Make the live triplets of each layer the singular triplets of its ΔW, the largest first; ΔW stays.

    P Λ Q = U Σ Vᵀ, from the QR of P Λ and of Qᵀ and the SVD of the product of their small factors. λ goes by Σ and adds
    up to ``total`` in each layer, so that together the triplets move ΔW as far in a step as before and the large ones
    farthest; the columns of P get one length, and the rows of Q the root mean square of theirs. Dead triplets stay as
    they are, and so do layers in which ΔW is 0 or not finite.

    In fp32 or wider. The number of operations goes by shapes of layers and not by layers.
    """
    batches: dict[tuple[object, ...], list[SvdLayer]] = defaultdict(list)
    for layer in layers:
        if layer.rank:
            batches[layer.lam.device, layer.lam.dtype, len(layer.lam)].append(layer)
    for batch in batches.values():
        _turn_(batch, total)


def copies_in(optimizer: Optimizer | None, weights: Sequence[nn.Parameter]) -> list[str]:
    """The names under which an optimizer keeps copies of the weights, which would pull them back after a turn."""
    if optimizer is None:
        return []
    kept = (optimizer.state[weight] for weight in weights if weight in optimizer.state)
    return sorted({str(name) for state in kept for name in state if name in _COPIES})


@attrs.frozen(eq=False)
class _Factors:
    """n layers of one shape: P (n, out, r) and Q (n, r, in), and the QR of P Λ and of Qᵀ without the dead triplets.

    ``left`` (n, out, k) and ``right`` (n, in, k') have orthonormal columns, k = min(out, r) and k' = min(in, r); the
    small factors are filled up with rows of 0 to (n, r, r).
    """

    p: Tensor
    q: Tensor
    left: Tensor
    right: Tensor
    small_left: Tensor
    small_right: Tensor


def _turn_(layers: Sequence[SvdLayer], total: float) -> None:
    """Layers on one device, of one dtype and rank in memory: what is large by shapes, what is small all at once."""
    shapes: dict[tuple[object, ...], list[SvdLayer]] = defaultdict(list)
    for layer in layers:
        shapes[layer.p.shape, layer.q.shape].append(layer)
    groups = list(shapes.values())
    ordered = [layer for group in groups for layer in group]
    sizes = [len(group) for group in groups]
    lam = _stacked([layer.lam for layer in ordered])
    live = torch.stack([layer.mask.to(lam.device) for layer in ordered])
    shown = live.to(lam.dtype)
    factors = [
        _factor(group, *parts)
        for group, *parts in zip(groups, torch.split(lam * shown, sizes), torch.split(shown, sizes), strict=True)
    ]
    turned, new_lam, on_left, on_right = _singular(
        torch.cat([each.small_left for each in factors]),
        torch.cat([each.small_right for each in factors]),
        lam,
        live,
        total,
    )
    _write_([layer.lam for layer in ordered], new_lam)
    parts = (torch.split(part, sizes) for part in (turned, on_left, on_right))
    for group, each, its, to_p, to_q in zip(groups, factors, *parts, strict=True):
        p = (each.left @ to_p[:, : each.left.shape[2]]).where(its.unsqueeze(1), each.p)
        q = (to_q[:, :, : each.right.shape[2]] @ each.right.mT).where(its.unsqueeze(2), each.q)
        _write_([layer.p for layer in group], p)
        _write_([layer.q for layer in group], q)


def _factor(layers: Sequence[SvdLayer], lam: Tensor, shown: Tensor) -> _Factors:
    """``lam`` and ``shown`` (n, r) are 0 for dead triplets."""
    p, q = _stacked([layer.p for layer in layers]), _stacked([layer.q for layer in layers])
    left, small_left = torch.linalg.qr(p * lam.unsqueeze(1))
    right, small_right = torch.linalg.qr((q * shown.unsqueeze(2)).mT)
    small = (pad(each, (0, 0, 0, lam.shape[1] - each.shape[1])) for each in (small_left, small_right))
    return _Factors(p, q, left, right, *small)


def _singular(
    small_left: Tensor, small_right: Tensor, lam: Tensor, live: Tensor, total: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which triplets are turned (n, r), the new λ (n, r), and what makes P of ``left`` and Q of ``right``, (n, r, r).

    ``small_left`` and ``small_right`` (n, r, r) are the small factors of P Λ and of Qᵀ.
    """
    core = small_left @ small_right.mT
    # The SVD of what is not finite raises.
    finite = core.isfinite().flatten(1).all(1, keepdim=True)
    u, sigma, vh = torch.linalg.svd(core.where(finite.unsqueeze(2), 0))
    turned = live & finite & (sigma[:, :1] > 0)
    # The i-th live triplet becomes the i-th singular one.
    place = (live.cumsum(1) - 1).clamp_min_(0)
    sigma = sigma.gather(1, place)
    shares = sigma.maximum(_LEAST_SHARE * sigma[:, :1]) * live
    new_lam = total * shares / shares.sum(1, keepdim=True)
    # right is orthonormal: the squares of Q's rows add up to those of its small factor.
    length = (small_right.square().sum((1, 2)) / live.sum(1)).sqrt().view(-1, 1)
    # Of the two signs that an SVD leaves open, the one that P Λ has already: the optimizer's averages then still hold.
    u = u.gather(2, place.unsqueeze(1).expand_as(u))
    sign = torch.where((small_left * u).sum(1) < 0, -1.0, 1.0)
    on_left = u * (sign * sigma / (length * new_lam)).unsqueeze(1)
    on_right = vh.gather(1, place.unsqueeze(2).expand_as(vh)) * (sign * length).unsqueeze(2)
    return turned, new_lam.where(turned, lam), on_left, on_right


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(weights))
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


def _write_(weights: Sequence[Tensor], values: Tensor) -> None:
    torch._foreach_copy_(list(weights), list(values.unbind()))
