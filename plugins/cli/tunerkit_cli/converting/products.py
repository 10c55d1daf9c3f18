"""How far two products of small matrices are from each other, without the large matrices that they stand for."""

import torch
from torch import Tensor

from tunerkit import Factors


def norm(product: Factors) -> float:
    """Return ‖P Q‖_F of q (r, in) and p (out, r), in the time of r² (in + out)."""
    if product.rank == 0:
        return 0.0
    # Not by Gram matrices: their entries are squares, so that a difference below 1e-8 of the norm would be lost.
    left, right = _triangle(product.p), _triangle(product.q.T)
    return float(torch.linalg.matrix_norm(left @ right.T))


def difference(one: Factors, other: Factors) -> float:
    """Return ‖P Q − P' Q'‖_F of two products for one weight."""
    return norm(Factors(q=torch.cat([one.q, other.q]), p=torch.cat([one.p, -other.p], dim=1)))


def relative(one: Factors | None, other: Factors | None) -> float:
    """Return the difference relative to the norm of ``one``, or to that of ``other`` if ``one`` is 0 or missing."""
    sizes = [norm(each) if each is not None else 0.0 for each in (one, other)]
    if one is None or other is None:
        return 1.0 if max(sizes) > 0 else 0.0
    scale = sizes[0] or sizes[1]
    return difference(one, other) / scale if scale > 0 else 0.0


def relative_tensor(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between two tensors relative to the largest value of ``one``; 1 for other shapes.

    Args:
        one: Any tensor; integers are compared as numbers.
        other: A tensor.
    """
    if one.shape != other.shape:
        return 1.0
    if one.numel() == 0:
        return 0.0
    gap = float((one.double() - other.double()).abs().max())
    scale = float(one.double().abs().max()) or float(other.double().abs().max())
    return gap / scale if scale > 0 else 0.0


def _triangle(matrix: Tensor) -> Tensor:
    """R of the QR decomposition: it has the matrix's own lengths and angles."""
    found: Tensor = torch.linalg.qr(matrix.double(), mode="r")[1]
    return found
