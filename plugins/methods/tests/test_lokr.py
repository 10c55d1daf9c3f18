"""LoKr: how a side of W is split into two."""

import pytest
from peft.tuners.lokr.layer import factorization

from tunerkit_methods.lokr import split


@pytest.mark.parametrize("factor", [-1, 0, 1, 4, 7, 16, 100])
def test_splits_a_size_as_peft_does(factor: int) -> None:
    """So the tensors of both have the same shapes: for every size up to 300, and two large ones."""
    for size in (*range(1, 301), 4096, 11008):
        assert split(size, factor) == factorization(size, factor)
