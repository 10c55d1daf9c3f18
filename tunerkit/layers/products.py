"""Matrix products of activations: their dtype, and the fastest library for them on this processor.

BLAS computes the products, with a thin factor on the faster side. On AMD's processors with AVX-512, fp32 products use
oneDNN, through the operation of torch's own compiler. The results differ only by the order of summation.
docs/evidence/speed.md has the measurements.
"""

import functools
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tunerkit.layers import torch_private

# The number of elements of an activation from which the choice saves time. In smaller products with thin factors on the
# left, the last bits depend on the number of rows and on memory alignment, so a training in several processes would
# differ more from one in a single process.
LEAST_NUMBERS = 1 << 16
CPUINFO = Path("/proc/cpuinfo")  # of Linux
_AMD = "AuthenticAMD"


def product_dtype(x: Tensor, q: Tensor) -> torch.dtype:
    """Return the dtype of the plain form's products: autocast's if autocast is on and no factor is fp64, else Q's."""
    if autocasts(q.device) and torch.float64 not in (x.dtype, q.dtype):
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the type of ``device``; False for the meta device, where a query would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Return a context manager that turns autocast off, so that products have the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def fold(q: Tensor, p: Tensor, lam: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return Q and P with λ multiplied into the smaller of them, since the other may be as large as a vocabulary."""
    if lam is None:
        return q, p
    # Views: a product saves its factors for backward, and the ``data`` of a parameter may be replaced before that.
    if q.shape[-1] <= p.shape[-2]:
        return lam.unsqueeze(-1) * q.view_as(q), p
    return q, p.view_as(p) * lam.unsqueeze(-2)


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """Compute X W, (n, m), for an activation ``x`` (n, k) and ``w`` (k, m)."""
    product = _onednn(x)
    if product is not None:
        return cast(Tensor, product.default(x, w.t(), None, "none", [], ""))
    parts = _parts(x, w.shape[1]) if is_thin(w.shape[1], w) and x.numel() >= LEAST_NUMBERS else 0
    if parts > 1:
        return w.t().expand(parts, -1, -1).bmm(x.unflatten(0, (parts, -1)).mT).mT.flatten(0, 1)
    return w.t().mm(x.t()).t() if parts else x.mm(w)


def affine(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Compute X Wᵀ + bias, (n, m), for an activation ``x`` (n, k) and a layer's ``w`` (m, k)."""
    product = _onednn(x)
    return F.linear(x, w, bias) if product is None else cast(Tensor, product.default(x, w, bias, "none", [], ""))


def gradient(h: Tensor, g: Tensor, of: Tensor, scale: float) -> Tensor:
    """Compute scale · Hᵀ G, the gradient of a factor ``of`` (r, m), for ``h`` (n, r) and an activation ``g`` (n, m).

    Only the shape, strides and dtype of ``of`` are used: the result may have the same strides.
    """
    product = _onednn(g)
    if product is not None:
        scaled = h if scale == 1 else h * scale
        return cast(Tensor, product.default(scaled.t(), g.t(), None, "none", [], ""))
    thin = is_thin(len(of), of)
    parts = _parts(g, len(of)) if thin and g.numel() >= LEAST_NUMBERS else 1
    # With beta=0, only the shape of the first argument is used.
    if parts > 1:
        left, right = h.unflatten(0, (parts, -1)).mT, g.unflatten(0, (parts, -1))
        return torch.baddbmm(of.unsqueeze(0), left, right, beta=0, alpha=scale).sum(0)
    if of.is_contiguous() or (thin and parts):
        return torch.addmm(of, h.t(), g, beta=0, alpha=scale)
    return torch.addmm(of.t(), g.t(), h, beta=0, alpha=scale).t()


def is_thin(rank: int, factor: Tensor) -> bool:
    """Whether BLAS is faster with ``factor`` on the left, so that the result has ``rank`` rows.

    True on a CPU, until ``rank`` values fill a vector register of 64 bytes. Not measured on GPUs.
    """
    return factor.device.type == "cpu" and rank * factor.element_size() < 64


def _parts(activation: Tensor, rank: int) -> int:
    """Return the number of row blocks for a product with the thin factor on the left; 0 to put it on the right.

    One block per thread, since BLAS hardly parallelizes such a product; one block for 16-bit dtypes, which oneDNN
    parallelizes. If the rows are too few, or cannot be cut into equal blocks: 1 for at most two threads, else 0.
    """
    threads = torch.get_num_threads() if activation.dtype.itemsize >= 4 else 1
    return threads if len(activation) % threads == 0 and len(activation) >= 4 * rank * threads else int(threads <= 2)


def _onednn(activation: Tensor) -> Any:
    """Return oneDNN's operation if gradients are off and it is faster for ``activation``, else None."""
    if activation.numel() < LEAST_NUMBERS or activation.dtype is not torch.float32 or activation.device.type != "cpu":
        return None
    if torch.is_grad_enabled() or not (prefers_onednn() and activation.is_contiguous()):
        return None
    return torch_private.onednn_product()


@functools.cache
def prefers_onednn() -> bool:
    """Whether fp32 products are faster in oneDNN: on AMD with AVX-512, which torch's BLAS (MKL) does not use there.

    The environment variable ATEN_CPU_CAPABILITY can disable AVX-512 in torch.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and torch.backends.mkl.is_available() and is_amd()


def is_amd() -> bool:
    """Whether the system reports an AMD processor."""
    try:
        with CPUINFO.open(encoding="utf-8") as file:  # the first core's part is enough
            return _AMD in file.read(4096)
    except OSError:  # Windows; on Linux, `platform.processor` would start a process
        return _AMD in platform.processor()
