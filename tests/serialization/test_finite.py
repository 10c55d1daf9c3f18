"""NaN and inf are found in every dtype, by name, and where they are not the base's own."""

import pytest
import torch
from torch import nn

from tunerkit.serialization.tensor_checks import nonfinite

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.complex64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_one_value_is_found_in_every_dtype(dtype: torch.dtype, value: float, at: int) -> None:
    """Wherever it stands, and only in the tensor that contains it."""
    wrong = torch.ones(7)
    wrong[at] = value
    assert nonfinite({"fine": torch.ones(7).to(dtype), "wrong": wrong.to(dtype)}) == ["wrong"]


def test_large_values_integers_and_empty_tensors_are_finite() -> None:
    """The largest number of each dtype, also of float64, is no overflow; a meta tensor has no values to check."""
    largest = {str(dtype): torch.full((2,), torch.finfo(dtype).max, dtype=dtype) for dtype in FLOATS[:4]}
    others = {"int": torch.tensor([2**62]), "bool": torch.tensor([True]), "empty": torch.empty(0, 3)}
    assert nonfinite({**largest, **others, "meta": torch.empty(3, device="meta"), "scalar": torch.tensor(1.0)}) == []


def test_a_parameter_that_is_trained_and_a_view_are_checked() -> None:
    """Gradients and strides do not matter."""
    parameter = nn.Parameter(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    assert nonfinite({"whole": parameter, "column": parameter[:, 0], "turned": parameter.t()}) == ["whole", "turned"]


def test_what_the_base_itself_contains_is_not_named() -> None:
    """A mask of -inf in a buffer is as it should be; another value that is not finite is named all the same."""
    mask = torch.tensor([0.0, -torch.inf, torch.nan])
    base = {"mask": mask, "spoilt": mask, "other": mask[:2]}
    tensors = {"mask": mask + 0, "spoilt": torch.tensor([torch.inf, -torch.inf, torch.nan]), "other": mask, "new": mask}
    assert nonfinite(tensors, base) == ["spoilt", "other", "new"]
