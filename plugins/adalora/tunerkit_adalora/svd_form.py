"""The SVD of ΔW at an allocation: exact, where the orthogonality regulariser only pulls P and Q towards it."""

from collections import Counter, defaultdict
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
# Ranger, timm's Lookahead, those with weights in full precision.
_COPIES = frozenset(
    {"ax", "z", "p0", "x0", "slow_buffer", "lookahead_params", "lookahead_slow_buff", "master_param", "master_weights"}
)


@torch.no_grad()
def to_svd_form_(layers: Sequence[SvdLayer], scores: Sequence[Tensor], *, total: float) -> None:
    """Make the live triplets of each layer the singular triplets of its ΔW; ΔW stays.

    P Λ Q = U Σ Vᵀ, from the QR of P Λ and of Qᵀ and the SVD of the product of their small factors. λ goes by Σ and adds
    up to ``total`` in each layer; the columns of P get one length, and the rows of Q the root mean square of theirs.
    The largest takes the place of the live triplet with the highest of the ``scores`` (r,), the next that of the next,
    so that what is known of a place holds for what comes there, as well as it can. Dead triplets stay as they are, and
    so do layers in which ΔW is 0 or not finite, or weights are frozen, shared or made of others.

    The number of operations goes by shapes of layers and not by layers.
    """
    seen = Counter(id(weight) for layer in layers for weight in layer.weights)
    batches: dict[tuple[object, ...], list[tuple[SvdLayer, Tensor]]] = defaultdict(list)
    for layer, score in zip(layers, scores, strict=True):
        own = all(weight.is_leaf and weight.requires_grad and seen[id(weight)] == 1 for weight in layer.weights)
        if layer.rank and own:
            batches[layer.lam.device, layer.lam.dtype, len(layer.lam)].append((layer, score))
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
    """The QR of P Λ and of Qᵀ of n layers of one shape, without the dead triplets.

    ``left`` (n, out, k) and ``right`` (n, in, k') have orthonormal columns, k = min(out, r) and k' = min(in, r); the
    small factors are filled up with rows of 0 to (n, r, r).
    """

    left: Tensor
    right: Tensor
    small_left: Tensor
    small_right: Tensor


def _turn_(batch: Sequence[tuple[SvdLayer, Tensor]], total: float) -> None:
    """Layers on one device, of one dtype and rank in memory: what is large by shapes, what is small all at once."""
    shapes: dict[tuple[object, ...], list[tuple[SvdLayer, Tensor]]] = defaultdict(list)
    for layer, score in batch:
        shapes[layer.p.shape, layer.q.shape].append((layer, score))
    groups = [[layer for layer, _ in group] for group in shapes.values()]
    layers = [layer for group in groups for layer in group]
    sizes = [len(group) for group in groups]
    lam = _wide([layer.lam for layer in layers])
    live = torch.stack([layer.mask.to(lam.device) for layer in layers])
    score = torch.stack([score for group in shapes.values() for _, score in group]).to(lam.device)
    factors = [
        _factor(group, *parts)
        for group, *parts in zip(groups, torch.split(lam * live, sizes), torch.split(live, sizes), strict=True)
    ]
    turned, new_lam, on_left, on_right = _singular(
        torch.cat([each.small_left for each in factors]),
        torch.cat([each.small_right for each in factors]),
        live,
        score,
        total,
    )
    _write_([layer.lam for layer in layers], new_lam, turned)
    parts = (torch.split(part, sizes) for part in (turned, on_left, on_right))
    for group, each, its, to_p, to_q in zip(groups, factors, *parts, strict=True):
        _write_([layer.p for layer in group], each.left @ to_p[:, : each.left.shape[2]], its.unsqueeze(1))
        _write_([layer.q for layer in group], to_q[:, :, : each.right.shape[2]] @ each.right.mT, its.unsqueeze(2))


def _factor(layers: Sequence[SvdLayer], lam: Tensor, live: Tensor) -> _Factors:
    """``lam`` (n, r) is 0 for dead triplets."""
    left, small_left = torch.linalg.qr(_wide([layer.p for layer in layers]).mul_(lam.unsqueeze(1)))
    right, small_right = torch.linalg.qr(_wide([layer.q for layer in layers]).mul_(live.unsqueeze(2)).mT)
    return _Factors(left, right, _filled(small_left), _filled(small_right))


def _filled(small: Tensor) -> Tensor:
    missing = small.shape[2] - small.shape[1]
    return pad(small, (0, 0, 0, missing)) if missing else small


def _singular(
    small_left: Tensor, small_right: Tensor, live: Tensor, score: Tensor, total: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which triplets are turned (n, r), the new λ (n, r), and what makes P of ``left`` and Q of ``right``, (n, r, r).

    ``small_left`` and ``small_right`` (n, r, r) are the small factors of P Λ and of Qᵀ. Where a triplet is not turned,
    the others say nothing.
    """
    core = small_left @ small_right.mT
    # The SVD of what is not finite raises.
    finite = core.sum((1, 2)).isfinite().unsqueeze(1)
    u, sigma, vh = torch.linalg.svd(core.where(finite.unsqueeze(2), 0))
    turned = live & finite & (sigma[:, :1] > 0)
    place = score.where(live, -1).argsort(descending=True, stable=True).argsort()
    shares = sigma.maximum(_LEAST_SHARE * sigma[:, :1]).gather(1, place) * live
    new_lam = total * shares / shares.sum(1, keepdim=True)
    # right is orthonormal: the squares of Q's rows add up to those of its small factor.
    length = (small_right.square().sum((1, 2)) / live.sum(1)).sqrt().unsqueeze(1)
    u = u.gather(2, place.unsqueeze(1).expand_as(u))
    # Of the two signs that an SVD leaves open, the one that P Λ has already: the optimizer's averages then still hold.
    sign = torch.where((small_left * u).sum(1) < 0, -1.0, 1.0)
    on_left = u * (sign * sigma.gather(1, place) / (length * new_lam)).unsqueeze(1)
    on_right = vh.gather(1, place.unsqueeze(2).expand_as(vh)) * (sign * length).unsqueeze(2)
    return turned, new_lam, on_left, on_right


def _wide(weights: Sequence[Tensor]) -> Tensor:
    """All in one tensor of fp64, which neither autocast nor TF32 rounds; MPS has only fp32."""
    stacked = torch.stack(list(weights))
    return stacked.to(torch.float32 if stacked.device.type == "mps" else torch.float64)


def _write_(weights: Sequence[Tensor], values: Tensor, turned: Tensor) -> None:
    """Put ``values`` (n, …) where ``turned``."""
    there = torch.stack(list(weights))
    torch._foreach_copy_(list(weights), list(values.to(there.dtype).where(turned, there).unbind()))
