"""DoRA's factor takes no dense matrix, and is exact at the start."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tunerkit
from tunerkit.plugin import BaseLayer
from tunerkit_methods.dora import Dora


def wrapped(dtype: str, **settings: object) -> tuple[Dora, BaseLayer]:
    torch.manual_seed(0)
    model = tunerkit.wrap(
        nn.Sequential(nn.Linear(12, 20)), "dora", {"targets": "0", "adapter_dtype": dtype, **settings}
    )
    adapter = tunerkit.tuner(model).adapters()["0"]
    base = tunerkit.layers.as_base_layer(model[0])
    assert isinstance(adapter, Dora)
    assert base is not None
    return adapter, base


def test_the_factor_is_that_of_the_dense_sum() -> None:
    """In fp64, f = m / ‖W + s B A‖ to 1e-14, also where B A is as large as W."""
    adapter, base = wrapped("float64", rank=3, alpha=6.0)
    with torch.no_grad():
        adapter.b.normal_()
        dense = base.dense().double() + 2.0 * adapter.b @ adapter.a
        assert torch.allclose(adapter.factor(base), adapter.m / dense.norm(dim=1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_factor_is_one_at_the_start(dtype: str) -> None:
    """In every dtype of the adapter, to the last bit: a rounded m is divided by a norm that is rounded alike."""
    adapter, base = wrapped(dtype)
    assert adapter.factor(base).eq(1).all()


def test_a_row_of_zeros_stays_finite() -> None:
    """A row of W that is 0, as a padding's, gives a finite factor and finite gradients."""
    adapter, base = wrapped("float32")
    with torch.no_grad():
        base.tensor("weight")[0] = 0
        adapter.m[0] = 0
    factor = adapter.factor(base)
    factor.sum().backward()
    assert factor.isfinite().all()
    assert adapter.m.grad is not None
    assert adapter.m.grad.isfinite().all()


class Made(TorchDispatchMode):
    """Counts the tensors of a shape that operations make, without those that only look at another one."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and tuple(out.shape) == self.shape:
            self.count += all(
                out.untyped_storage().data_ptr() != each.untyped_storage().data_ptr()
                for each in args
                if isinstance(each, torch.Tensor)
            )
        return out


def test_the_factor_makes_no_matrix_as_large_as_a_wide_weight() -> None:
    """It reads W in fp32 as it is."""
    adapter, base = wrapped("float32", rank=3)
    with Made((20, 12)) as made:
        adapter.factor(base)
    assert made.count == 0
