"""Products of activations: their dtype, and the library that takes the least time on this processor.

BLAS computes them, with a thin factor on the side where it takes less time. Only on AMD's processors with AVX-512, fp32
products go to oneDNN, through the operation that torch's own compiler uses. The sums are the same, up to their order.
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

# Numbers of an activation from which the choice saves time. With thin factors on the left, the last bits of a smaller
# product depend on how many rows there are and where they lie in memory: a training of several processes would differ
# more from one of one.
LEAST_NUMBERS = 1 << 16
CPUINFO = Path("/proc/cpuinfo")  # of Linux
_AMD = "AuthenticAMD"


def product_dtype(x: Tensor, q: Tensor) -> torch.dtype:
    """The dtype of the plain form's products: autocast's, which does not apply to float64, or else Q's."""
    if autocasts(q.device) and torch.float64 not in (x.dtype, q.dtype):
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the type of ``device``. The meta device has none, and querying it would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast: products keep the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def fold(q: Tensor, p: Tensor, lam: Tensor | None) -> tuple[Tensor, Tensor]:
    """Multiply λ into the smaller of Q and P, so that a side as large as a vocabulary is not copied."""
    if lam is None:
        return q, p
    # Views: a product saves its factors for backward, and the ``data`` of a parameter may be replaced before that.
    if q.shape[1] <= p.shape[0]:
        return lam.unsqueeze(1) * q.view_as(q), p
    return q, p.view_as(p) * lam.view_as(lam)


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

    It may have the strides of ``of``, whose values are not read.
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
    """Whether BLAS multiplies with a ``factor`` faster where its ``rank`` is on the left, as rows of the result.

    On a CPU it does, until ``rank`` values fill a vector register of 64 bytes. On a GPU, nothing is known.
    """
    return factor.device.type == "cpu" and rank * factor.element_size() < 64


def _parts(activation: Tensor, rank: int) -> int:
    """In how many products of as many rows one with a thin factor on the left is computed: one for each thread.

    BLAS hardly divides such a product. 0 means that the factor is to stand on the right: with more than two threads,
    where the rows are no multiple of them, or so few that adding the parts of a gradient costs what is saved. oneDNN
    divides products of narrow dtypes itself.
    """
    threads = torch.get_num_threads() if activation.dtype.itemsize >= 4 else 1
    return threads if len(activation) % threads == 0 and len(activation) >= 4 * rank * threads else int(threads <= 2)


def _onednn(activation: Tensor) -> Any:
    """OneDNN's product, if one with ``activation`` is to go there; autograd cannot differentiate it."""
    if activation.numel() < LEAST_NUMBERS or activation.dtype is not torch.float32 or activation.device.type != "cpu":
        return None
    if torch.is_grad_enabled() or not (prefers_onednn() and activation.is_contiguous()):
        return None
    return torch_private.onednn_product()


@functools.cache
def prefers_onednn() -> bool:
    """Whether fp32 products take less time in oneDNN: the BLAS is MKL, which doesn't use the AVX-512 that is there.

    MKL uses it on Intel's processors. For torch, ATEN_CPU_CAPABILITY may deny it.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and torch.backends.mkl.is_available() and is_amd()


def is_amd() -> bool:
    """Whether the processor is one of AMD's, as the system says."""
    try:
        with CPUINFO.open(encoding="utf-8") as file:  # the first core's part is enough
            return _AMD in file.read(4096)
    except OSError:  # Windows has none; Linux would start a process to answer the next question
        return _AMD in platform.processor()
