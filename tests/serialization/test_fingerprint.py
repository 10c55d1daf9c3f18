"""The fingerprint: equal for the same base in any precision and state, different for another base, and cheap."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import tunerkit
from tests.support.toys import Toys
from tunerkit.serialization.fingerprint import SAMPLES, differences, fingerprint

pytestmark = pytest.mark.usefixtures("toys")  # registers the methods
FLOATS = st.floats(-1e4, 1e4, allow_subnormal=False)


class Alone(nn.Module):
    """A parameter, beside a layer that can be wrapped."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)
        self.layer = nn.Linear(1, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.ones_(self.layer.bias)


def of(values: torch.Tensor) -> Any:
    model = tunerkit.wrap(Alone(values), "toy-shift", {"targets": ["layer"]})
    return fingerprint(tunerkit.tuner(model))


def test_it_names_every_parameter_of_the_base_but_those_trained(toys: "Toys") -> None:
    """Names and shapes are the plain model's; copies, trained biases and adapters are left out."""
    found = fingerprint(tunerkit.tuner(toys.trained(targets=["conv"], train_modules=["head"], bias="adapters")))
    expected = {
        n: list(p.shape) for n, p in toys.net().named_parameters() if not n.startswith("head") and n != "conv.bias"
    }
    assert {name: entry["shape"] for name, entry in found.items()} == expected


def test_it_is_the_bases_in_every_state_of_the_adapter(toys: "Toys") -> None:
    """Trained, merged, disabled, or with a second adapter: always the plain base's."""
    model = toys.trained(targets=["conv", "layers.0"], bias="adapters")
    expected = fingerprint(
        tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-shift", {"targets": ["conv", "layers.0"], "bias": "adapters"}))
    )
    assert fingerprint(tunerkit.tuner(model)) == expected
    tunerkit.wrap(model, "toy-shift", {"targets": ["head.0"], "train_modules": ["norm"]}, adapter="second")
    toys.fill_(model)
    assert fingerprint(tunerkit.tuner(model, "default")) == expected
    tunerkit.merge(model)
    assert fingerprint(tunerkit.tuner(model, "default")) == expected
    with tunerkit.disabled(model):
        assert fingerprint(tunerkit.tuner(model, "default")) == expected


@given(
    values=st.lists(FLOATS, min_size=1, max_size=12),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float64]),
)
@settings(max_examples=30)
def test_another_precision_is_the_same_base(toys: "Toys", values: list[float], dtype: torch.dtype) -> None:
    """Rounding to any floating dtype is no difference."""
    exact = torch.tensor(values)
    assert differences(of(exact), of(exact.to(dtype))) == []
    assert differences(of(exact.to(dtype)), of(exact)) == []


@given(size=st.integers(1, SAMPLES), data=st.data(), start=st.floats(0.01, 100))
@settings(max_examples=20)
def test_another_value_is_seen_in_small_tensors_wherever_it_is(
    toys: "Toys", size: int, data: st.DataObject, start: float
) -> None:
    """Small tensors are sampled completely: one value that differs by two percent is another base."""
    values = torch.full((size,), start)
    other = values.clone()
    other[data.draw(st.integers(0, size - 1))] *= 1.02
    assert differences(of(values), of(other)) == ["other values: values"]


def test_first_and_last_values_are_sampled_whatever_the_strides(toys: "Toys") -> None:
    """Samples are spread over the whole tensor, and a transposed view is sampled in its own order."""
    tensor = torch.arange(1.0, 13.0).reshape(3, 4)
    assert of(tensor)["values"]["sample"] == [1.0, 4.0, 8.0, 12.0]
    assert of(tensor.t().contiguous().t()) == of(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        *(torch.zeros(0, 3), torch.tensor(2.0), torch.tensor([3, 5]), torch.tensor([torch.nan, torch.inf])),
        torch.empty(3, device="meta"),
    ],
)
def test_odd_tensors_have_a_fingerprint_that_json_can_hold(toys: "Toys", tensor: torch.Tensor) -> None:
    """Empty, scalar, integer and non-finite parameters work; where there are no values, none are invented."""
    entry = of(tensor)["values"]
    assert bool(entry["sample"]) == bool(tensor.numel() and not tensor.is_meta)
    assert entry["shape"] == list(tensor.shape)
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_every_kind_of_difference_has_its_line_and_long_lists_end() -> None:
    """Missing, unexpected, reshaped and changed: one line each, with the first five names and the count of others."""

    def entries(names: range, shape: int = 1, value: float = 1.0) -> dict[str, Any]:
        return {f"p{i}": {"shape": [shape], "dtype": "float32", "sample": [value] * SAMPLES} for i in names}

    saved = {**entries(range(7)), **entries(range(10, 11)), **entries(range(20, 21))}
    found = {**entries(range(30, 32)), **entries(range(10, 11), shape=2), **entries(range(20, 21), value=1.1)}
    assert differences(saved, found) == [
        "parameters that this base lacks: p0, p1, p2, p3, p4 and 2 more",
        "parameters that only this base has: p30, p31",
        "other shapes (saved -> here): p10 [1] -> [2]",
        "other values: p20",
    ]
    assert differences(saved, saved) == []


def test_its_cost_scales_with_tensors_not_with_bytes(toys: "Toys") -> None:
    """A tensor of 400 GB has a fingerprint too: only a few of its values are read."""
    huge = torch.ones(()).expand(10**6, 10**5)
    assert of(huge)["values"] == {"shape": [10**6, 10**5], "dtype": "float32", "sample": [1.0] * SAMPLES}


def test_the_same_dtype_is_compared_to_the_digits_kept_and_another_to_its_own() -> None:
    """A light fine-tune is another base; a base in bfloat16 is the same one; meta tensors have no values."""

    def entry(dtype: str, value: float, count: int = SAMPLES) -> dict[str, Any]:
        return {"p": {"shape": [8], "dtype": dtype, "sample": [value] * count}}

    assert differences(entry("float32", 1.0), entry("float32", 1.005)) == ["other values: p"]
    assert differences(entry("float32", 1.0), entry("float32", 1.000001)) == []
    assert differences(entry("float32", 1.0), entry("bfloat16", 1.005)) == []
    assert differences(entry("float32", 1.0), entry("bfloat16", 1.02)) == ["other values: p"]
    assert differences(entry("float32", 0.0, 0), entry("float32", 1.0)) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.uint8, torch.bool])
def test_every_dtype_of_a_base_is_sampled(dtype: torch.dtype) -> None:
    """Bases in 8-bit floats and quantised integer bases have values to compare, too."""
    values = torch.arange(12).reshape(3, 4).remainder(2).to(dtype).t()
    sample = of(values)["values"]["sample"]
    flat = [float(value) for value in values.float().reshape(-1)]
    assert sample == [flat[i * 11 // (SAMPLES - 1)] for i in range(SAMPLES)]
