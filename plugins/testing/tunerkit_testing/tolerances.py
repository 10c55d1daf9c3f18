"""How far two ways of computing the same may differ, by the dtype that they compute in."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

# Of the largest absolute value expected, after the few layers of a small model: in 16 bits, four units of rounding.
_OUTPUTS: Final[Mapping[torch.dtype, float]] = MappingProxyType(
    {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}
)
# Of what an adapter adds, for checks that run in fp64 whatever the config says: a method may compute in fp32 what its
# libraries compute there alone. One that is configured for fp64 must not.
_DELTA: Final = 1e-6


def of_output(*dtypes: torch.dtype) -> float:
    """Return the share of the largest output by which two outputs may differ.

    Args:
        dtypes: The dtypes of the output and of the adapters; the least precise one counts.
    """
    return max(_OUTPUTS[dtype] for dtype in dtypes)


def of_delta(dtype: torch.dtype) -> float:
    """Return the share of what an adapter adds by which its delta may differ from it in fp64.

    Args:
        dtype: The dtype of the adapters that the method is configured for.
    """
    return _OUTPUTS[dtype] if dtype == torch.float64 else _DELTA
