"""Names of transformers that its documentation does not promise, in one file."""

import sys
from typing import Any

from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, *, is_transposed: bool) -> Tensor:
    """Compute the products of transformers' implementation "grouped_mm", so that adapters change no bit of the base.

    Args:
        x: Rows, (N, in), sorted by expert.
        weight: (E, out, in), or (E, in, out) if ``is_transposed``.
        ends: The end of each expert's rows, (E,) int32.
        bias: The bias of each row, (N, out), or None.
        is_transposed: The layout of ``weight``.
    """
    from transformers.integrations.moe import _grouped_linear

    product: Tensor = _grouped_linear(x, weight, ends, bias=bias, is_transposed=is_transposed)
    return product


def interface() -> Any:
    """Return the register of experts functions; None if no model with experts has been imported from transformers."""
    moe: Any = sys.modules.get("transformers.integrations.moe")  # not imported here, which takes seconds
    return None if moe is None else moe.ALL_EXPERTS_FUNCTIONS
