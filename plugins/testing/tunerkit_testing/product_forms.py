"""The two forms of a low-rank product, each for inputs of any size until the end of a block."""

from contextlib import AbstractContextManager
from unittest import mock


def fused_form() -> AbstractContextManager[object]:
    """Use the fused form wherever it is right, however small the input is."""
    return _from(0)


def plain_form() -> AbstractContextManager[object]:
    """Use the plain form, however large the input is."""
    return _from(1 << 63)


def _from(numbers: int) -> AbstractContextManager[object]:
    return mock.patch.multiple("tunerkit.layers.low_rank", LEAST_NUMBERS=numbers, LEAST_ON_A_GPU=numbers)
