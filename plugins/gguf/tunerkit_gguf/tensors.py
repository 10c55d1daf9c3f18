"""The two tensors of llama.cpp for a product, and back.

llama.cpp adds alpha / r · lora_b (lora_a x), with the rank r of that pair (``llama_adapter_lora_weight::get_scale``).
"""

import attrs
import torch
from torch import Tensor

from tunerkit.plugin import Factors


@attrs.frozen(eq=False)
class Pair:
    """A pair of a file, in the order of rows that the model has in torch: a (r, in), b (out, r)."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """The number r of rows of a and columns of b."""
        return self.a.shape[0]


def pair_of(product: Factors, *, alpha: int) -> Pair:
    """Return the pair that adds a product under llama.cpp's scale, in fp32.

    Args:
        product: q (r, in), p (out, r), with r > 0.
        alpha: The file's alpha, which all pairs share.

    Returns:
        a = q and b = r / alpha · p.
    """
    return Pair(a=product.q.float(), b=product.p.float() * (product.rank / alpha))


def permute(rows: Tensor, heads: int) -> Tensor:
    """Order the rows of q or k as llama.cpp's rotary embedding wants them.

    A head's rows are two halves in transformers. llama.cpp rotates neighbours, so the halves are interleaved
    (``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py``).

    Args:
        rows: (heads · 2 · n, r).
        heads: The number of heads.
    """
    return _swapped(rows, heads, 2, -1)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Undo `permute`."""
    return _swapped(rows, heads, -1, 2)


def _swapped(rows: Tensor, heads: int, outer: int, inner: int) -> Tensor:
    out, r = rows.shape
    half = out // heads // 2
    outer, inner = (half if each == -1 else each for each in (outer, inner))
    return rows.reshape(heads, outer, inner, r).transpose(1, 2).reshape(out, r)


def without(q: Tensor, index: int | None) -> Tensor:
    """Return q (r, in) with 0 in one column: llama.cpp knows no padding token, at which tunerkit adds nothing."""
    if index is None:
        return q
    kept = torch.ones(q.shape[1], dtype=q.dtype)
    kept[index] = 0
    return q * kept
