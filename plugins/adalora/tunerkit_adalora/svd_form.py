"""The SVD form: rotate triplets into the exact singular triplets of ΔW, which the penalty only approximates."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from tunerkit_adalora.svd_layer import SvdLayer

# The least λ, relative to the largest λ of the layer. At 0 a triplet would never move again: P and Q would have
# gradients of 0.
_LEAST_SHARE = 1e-4


@torch.no_grad()
def to_svd_form_(layers: Sequence[SvdLayer], scores: Sequence[Tensor], *, total: float) -> None:
    """Re-parametrise: make the live triplets of each layer the singular triplets of its ΔW, which does not change.

    P Λ Q = U Σ Vᵀ, from the QR of P Λ and of Qᵀ and the SVD of the product of their small factors. λ is proportional to
    Σ. The columns of P get equal lengths, and the rows of Q the root mean square of their lengths. Singular triplets in
    descending order take the indices of live triplets in descending order of score, so that statistics of an index
    still fit the new triplet as well as possible.

    Dead triplets are not changed, nor are layers whose ΔW is 0 or not finite, or whose weights are frozen, shared or
    parametrised. Each matrix of a stack is treated like a layer. The number of operations scales with the number of
    distinct shapes, not of layers.

    Args:
        layers: The layers, with masks and λ as the allocation left them.
        scores: The score (r,), or (E, r), of each layer's triplets.
        total: The sum of λ of each matrix.
    """
    uses = Counter(id(weight) for layer in layers for weight in layer.weights)
    batches: dict[tuple[object, ...], list[tuple[SvdLayer, Tensor]]] = defaultdict(list)
    for layer, score in zip(layers, scores, strict=True):
        own = all(weight.is_leaf and weight.requires_grad and uses[id(weight)] == 1 for weight in layer.weights)
        if layer.rank and own:
            batches[layer.lam.device, layer.lam.dtype, layer.lam.shape].append((layer, score))
    for batch in batches.values():
        _rotate_(batch, total)


@attrs.frozen(eq=False)
class _Factors:
    """The QR of P Λ and of Qᵀ of n matrices of one shape, without the dead triplets.

    ``left`` (n, out, k) and ``right`` (n, in, k') have orthonormal columns, k = min(out, r) and k' = min(in, r). The
    small factors are padded with zero rows to (n, r, r).
    """

    left: Tensor
    right: Tensor
    small_left: Tensor
    small_right: Tensor


@attrs.frozen(eq=False)
class _Rotation:
    """New values from the SVD of small_left small_rightᵀ, which are valid only where ``rotated`` is True.

    ``rotated`` (n, r): the triplets with new values. ``lam`` (n, r): the new λ. ``to_p`` and ``to_q`` (n, r, r): the
    matrices from ``left`` to P, and from ``right`` to Q.
    """

    rotated: Tensor
    lam: Tensor
    to_p: Tensor
    to_q: Tensor


def _rotate_(batch: Sequence[tuple[SvdLayer, Tensor]], total: float) -> None:
    """Rotate layers that share device, dtype and shape of λ: P and Q in a batch per shape, small matrices in one."""
    shapes: dict[tuple[object, ...], list[tuple[SvdLayer, Tensor]]] = defaultdict(list)
    for layer, score in batch:
        shapes[layer.p.shape, layer.q.shape].append((layer, score))
    groups = [[layer for layer, _ in group] for group in shapes.values()]
    layers = [layer for group in groups for layer in group]
    sizes = [len(group) * layers[0].matrices for group in groups]
    lam = _wide([layer.lam for layer in layers], dims=1)
    live = _stacked([layer.mask.to(lam.device) for layer in layers], dims=1)
    score = _stacked([score for group in shapes.values() for _, score in group], dims=1).to(lam.device)
    factors = [
        _factor(group, *parts)
        for group, *parts in zip(groups, torch.split(lam * live, sizes), torch.split(live, sizes), strict=True)
    ]
    small_left, small_right = torch.cat([f.small_left for f in factors]), torch.cat([f.small_right for f in factors])
    rotation = _singular(small_left, small_right, live, score, total)
    _write_([layer.lam for layer in layers], rotation.lam, rotation.rotated)
    parts = (torch.split(part, sizes) for part in (rotation.rotated, rotation.to_p, rotation.to_q))
    for group, factor, rotated, to_p, to_q in zip(groups, factors, *parts, strict=True):
        p = factor.left @ to_p[:, : factor.left.shape[2]]
        _write_([layer.p for layer in group], p, rotated.unsqueeze(1))
        q = to_q[:, :, : factor.right.shape[2]] @ factor.right.mT
        _write_([layer.q for layer in group], q, rotated.unsqueeze(2))


def _factor(layers: Sequence[SvdLayer], lam: Tensor, live: Tensor) -> _Factors:
    """Return the QR of P Λ and of Qᵀ of each matrix; ``lam`` (n, r) is 0 for dead triplets."""
    left, small_left = torch.linalg.qr(_wide([layer.p for layer in layers], dims=2).mul_(lam.unsqueeze(1)))
    right, small_right = torch.linalg.qr(_wide([layer.q for layer in layers], dims=2).mul_(live.unsqueeze(2)).mT)
    return _Factors(left, right, _filled(small_left), _filled(small_right))


def _filled(small: Tensor) -> Tensor:
    missing = small.shape[2] - small.shape[1]
    return pad(small, (0, 0, 0, missing)) if missing else small


def _singular(small_left: Tensor, small_right: Tensor, live: Tensor, score: Tensor, total: float) -> _Rotation:
    """Return the rotation to the SVD of P Λ Q, from the small factors (n, r, r) of P Λ and of Qᵀ."""
    core = small_left @ small_right.mT
    # The SVD of a matrix that is not finite raises.
    finite = core.sum((1, 2)).isfinite().unsqueeze(1)
    u, sigma, vh = torch.linalg.svd(core.where(finite.unsqueeze(2), 0))
    rotated = live & finite & (sigma[:, :1] > 0)
    standing = score.where(live, -1).argsort(descending=True, stable=True).argsort()
    shares = sigma.maximum(_LEAST_SHARE * sigma[:, :1]).gather(1, standing) * live
    new_lam = total * shares / shares.sum(1, keepdim=True)
    # right is orthonormal, so Q and its small factor have the same sum of squares.
    length = (small_right.square().sum((1, 2)) / live.sum(1)).sqrt().unsqueeze(1)
    u = u.gather(2, standing.unsqueeze(1).expand_as(u))
    # The signs of an SVD are arbitrary. Take the signs of the present P Λ, so that the optimizer's averages still fit.
    sign = torch.where((small_left * u).sum(1) < 0, -1.0, 1.0)
    to_p = u * (sign * sigma.gather(1, standing) / (length * new_lam)).unsqueeze(1)
    to_q = vh.gather(1, standing.unsqueeze(2).expand_as(vh)) * (sign * length).unsqueeze(2)
    return _Rotation(rotated, new_lam, to_p, to_q)


def _stacked(tensors: Sequence[Tensor], *, dims: int) -> Tensor:
    """Stack tensors, whose last ``dims`` dimensions belong to one matrix: (n, …), with n matrices."""
    stacked = torch.stack(list(tensors))
    return stacked.flatten(0, -1 - dims)


def _wide(weights: Sequence[Tensor], *, dims: int) -> Tensor:
    """Return `_stacked` weights in fp64, which neither autocast nor TF32 rounds; in fp32 on MPS."""
    stacked = _stacked(weights, dims=dims)
    return stacked.to(torch.float32 if stacked.device.type == "mps" else torch.float64)


def _write_(weights: Sequence[Tensor], values: Tensor, where: Tensor) -> None:
    """Write ``values`` (n, …) into the weights where ``where`` is True."""
    old = _stacked(weights, dims=values.ndim - 1)
    new = values.to(old.dtype).where(where, old)
    torch._foreach_copy_(list(weights), list(new.reshape(len(weights), *weights[0].shape).unbind()))
