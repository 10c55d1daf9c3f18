"""The low-rank product compared with layers with merged weights: values, gradients, dtypes and edge cases."""

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from tests.support.layer_law import built, described
from tests.support.products import adapted
from tunerkit.errors import AdapterError
from tunerkit.layers import BaseLayer, as_base_layer, low_rank
from tunerkit.layers.low_rank import add_low_rank, low_rank_delta

LAYERS = ("linear", "matrix", "conv1d", "conv2d", "conv3d", "embedding", "transposed", "scaled")
FLOATING = ("linear", "matrix", "conv1d", "conv2d", "conv3d", "transposed")


def layer(name: str, dtype: torch.dtype = torch.float64) -> tuple[BaseLayer, Tensor]:
    """A layer of each kind with random weights, and an input for it; "matrix" is a linear layer's of two dimensions."""
    module, x = built("linear" if name == "matrix" else name)
    x = x.flatten(0, 1) if name == "matrix" else x
    return described(module.to(dtype).requires_grad_(False)), x.to(dtype) if x.is_floating_point() else x


def triplets(base: BaseLayer, rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Random q (r, in), lam (r,), p (out, r)."""
    return {
        "q": torch.randn(rank, base.in_features, dtype=dtype),
        "p": torch.randn(base.out_features, rank, dtype=dtype),
        "lam": torch.randn(rank, dtype=dtype),
    }


def merged(base: BaseLayer, delta: Tensor) -> Any:
    """A copy of the layer with ``delta`` (out, in) in its weight."""
    module: Any = copy.deepcopy(base.module)
    module.weight.data += base.pack(delta).to(module.weight.dtype)
    return module


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.floats(-4, 4), st.booleans())
def test_the_sum_equals_the_merged_layer(name: str, rank: int, scale: float, diagonal: bool) -> None:
    """Adding scale · P diag(λ) Q x gives the output with the sum over triplets scale · λ_i p_i q_iᵀ in the weight."""
    base, x = layer(name)
    factors = triplets(base, rank)
    lam = factors["lam"] if diagonal else torch.ones(rank, dtype=torch.float64)
    if not diagonal:
        del factors["lam"]
    delta = torch.zeros(base.out_features, base.in_features, dtype=torch.float64)
    for i in range(rank):
        delta += scale * lam[i] * torch.outer(factors["p"][:, i], factors["q"][i])
    torch.testing.assert_close(low_rank_delta(base, scale=scale, **factors), delta, rtol=1e-10, atol=1e-10)
    y = add_low_rank(base, x, base.module(x), scale=scale, **factors)
    torch.testing.assert_close(y, merged(base, delta)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_finite_differences(name: str, dropout: float) -> None:
    """For the input, the output it is added to, P, Λ and Q; with dropout under one fixed draw."""
    base, x = layer(name)
    factors = triplets(base, 2)
    y = base.module(x)
    leaves = [t.detach().requires_grad_() for t in (y, *factors.values())]
    if x.is_floating_point():
        leaves.append(x.requires_grad_())

    def add(y: Tensor, q: Tensor, p: Tensor, lam: Tensor, x: Tensor = x) -> Tensor:
        torch.manual_seed(1)
        return add_low_rank(base, x, y, q=q, p=p, lam=lam, scale=0.7, dropout=dropout)

    assert torch.autograd.gradcheck(add, leaves)
    assert name != "matrix" or torch.autograd.gradgradcheck(add, leaves)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_falls_on_the_input_of_the_product_alone(name: str) -> None:
    """Dropping everything leaves y, dropping half gives the same on average: y itself is never dropped."""
    base, x = layer(name)
    factors = triplets(base, 2)
    y = base.module(x)
    assert torch.equal(add_low_rank(base, x, y, scale=2.0, dropout=1.0, **factors), y)
    whole = add_low_rank(base, x, y, scale=2.0, **factors)
    torch.manual_seed(0)
    draws = torch.stack([add_low_rank(base, x, y, scale=2.0, dropout=0.5, **factors) for _ in range(400)])
    error = (draws.mean(0) - whole).abs()
    assert (error <= 6 * draws.std(0) / 400**0.5 + 1e-9).all()
    assert draws.std(0).any()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", ["p", "lam"])
def test_a_zero_delta_leaves_the_output_bit_for_bit(name: str, dtype: torch.dtype, zero: str) -> None:
    """With fp32 adapters on a base of any dtype, shape and dtype stay, also under autocast."""
    base, x = layer(name, dtype)
    factors = triplets(base, 3, torch.float32)
    factors[zero].zero_()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = base.module(x)
            added = add_low_rank(base, x, y, scale=2.0, **factors)
        assert added.dtype == y.dtype
        assert torch.equal(added, y)


@pytest.mark.parametrize("name", LAYERS)
def test_adapters_in_fp32_compute_in_fp32_beside_a_bf16_base(name: str) -> None:
    """Only the final delta is rounded to the base's dtype."""
    base, x = layer(name, torch.bfloat16)
    factors = triplets(base, 3, torch.float32)
    y = base.module(x)
    wide = x.float() if x.is_floating_point() else x
    exact = add_low_rank(base, wide, torch.zeros_like(y, dtype=torch.float32), scale=1.0, **factors)
    assert torch.equal(add_low_rank(base, x, y, scale=1.0, **factors), y + exact.bfloat16())


@pytest.mark.parametrize("name", FLOATING)
def test_autocast_chooses_the_dtype_of_the_product(name: str) -> None:
    """Under autocast, fp32 factors multiply like bf16 ones; the tensor they are added to keeps its dtype."""
    base, x = layer(name, torch.float32)
    factors = triplets(base, 3, torch.float32)
    del factors["lam"]
    y = torch.zeros_like(base.module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        added = add_low_rank(base, x, y, scale=1.0, **factors)
    half = {key: value.bfloat16() for key, value in factors.items()}
    assert added.dtype == torch.float32
    assert torch.equal(added, add_low_rank(base, x.bfloat16(), y.bfloat16(), scale=1.0, **half).float())


def test_autocast_does_not_widen_the_input_first() -> None:
    """A bf16 input reaches Q unchanged: casting it to fp32, and autocast casting it back, would cost two copies."""
    seen = []
    base, x = layer("linear", torch.bfloat16)
    factors = triplets(base, 2, torch.float32)
    original = F.linear

    def linear(input: Tensor, *args: Any) -> Tensor:
        seen.append(input.dtype)
        return original(input, *args)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(F, "linear", linear)
        add_low_rank(base, x, torch.zeros(2, 3, 4), scale=1.0, **factors)
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(("base_dtype", "dtype"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_float64_on_one_side_works_under_autocast(base_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Autocast ignores float64, so it would not convert the two to one dtype."""
    base, x = layer("linear", base_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = base.module(x)
        assert add_low_rank(base, x, y, scale=1.0, **triplets(base, 2, dtype)).dtype == y.dtype


@pytest.mark.parametrize("name", LAYERS)
def test_rank_zero_gives_the_output_itself(name: str) -> None:
    """And a delta of zeros."""
    base, x = layer(name)
    factors = triplets(base, 0)
    y = base.module(x)
    assert add_low_rank(base, x, y, scale=2.0, dropout=0.5, **factors) is y
    delta = low_rank_delta(base, scale=2.0, **factors)
    assert delta.shape == (base.out_features, base.in_features)
    assert not delta.any()


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_gives_an_empty_output(name: str) -> None:
    """Backward works too and leaves gradients of 0."""
    base, x = layer(name)
    factors = {key: value.requires_grad_() for key, value in triplets(base, 2).items()}
    y = base.module(x[:0])
    added = add_low_rank(base, x[:0], y, scale=2.0, **factors)
    assert added.shape == y.shape
    added.sum().backward()
    assert all(value.grad is not None and not value.grad.any() for value in factors.values())


@pytest.mark.parametrize("name", LAYERS)
def test_neither_input_nor_output_nor_factors_are_written_to(name: str) -> None:
    """Autograd may still need them."""
    base, x = layer(name)
    tensors = {"x": x, "y": base.module(x), **triplets(base, 2)}
    before = {key: value.clone() for key, value in tensors.items()}
    add_low_rank(base, tensors["x"], tensors["y"], scale=2.0, dropout=0.5, **{k: tensors[k] for k in ("q", "p", "lam")})
    assert all(torch.equal(tensors[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["embedding", "scaled"])
def test_the_padding_row_is_untouched_and_untrained(name: str) -> None:
    """Its output is the base's bit for bit, and its column of Q has a gradient of exactly 0."""
    base, _ = layer(name)
    factors = triplets(base, 2)
    factors["q"][:, 1] = torch.nan
    for factor in factors.values():
        factor.requires_grad_()
    ids = torch.tensor([1, 0, 1, 3])
    y = base.module(ids)
    added = add_low_rank(base, ids, y, scale=2.0, **factors)
    assert torch.equal(added[[0, 2]], y[[0, 2]])
    assert not torch.isclose(added[[1, 3]], y[[1, 3]]).any()
    added.square().sum().backward()
    gradient = factors["q"].grad
    assert gradient is not None
    assert torch.equal(gradient.any(0), torch.tensor([True, False, False, True, False]))


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_a_delta_is_computed_in_fp32_or_wider_wherever_it_is_asked_for(
    stored: torch.dtype, computed: torch.dtype
) -> None:
    """Half-precision factors are widened before they are multiplied, and autocast changes nothing."""
    base, _ = layer("linear")
    factors = triplets(base, 3, stored)
    exact = factors["p"].double() @ factors["lam"].double().diag() @ factors["q"].double() * 1.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta = low_rank_delta(base, scale=1.5, **factors)
    assert delta.dtype == computed
    torch.testing.assert_close(delta.double(), exact, rtol=1e-5, atol=1e-6)


def test_factors_of_another_layer_are_refused_in_words() -> None:
    """The message says both shapes."""
    base, _ = layer("linear")
    with pytest.raises(AdapterError, match=r"shape \(4, 6\).*base layer has \(4, 5\)"):
        low_rank_delta(base, q=torch.zeros(2, 6), p=torch.zeros(4, 2), scale=1.0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_output_may_be_overwritten_from_a_limit_of_its_device_on(device: str) -> None:
    """The numbers of the input decide. A GPU's limit is higher: there the host's time counts."""
    layer = adapted(nn.Linear(1024, 1, device=device))
    limit = low_rank.LEAST_NUMBERS if device == "cpu" else low_rank.LEAST_ON_A_GPU
    for rows in (limit // 1024 - 1, limit // 1024):
        x, y = (torch.empty(rows, size, device=device) for size in (1024, 1))
        assert low_rank.mark(layer.tunerkit.base, x, y, traced=False) == (x.numel() == limit)


def test_the_meta_device_works() -> None:
    """Shapes can be computed without memory; that device has no autocast."""
    base = as_base_layer(nn.Linear(5, 4, device="meta"))
    assert base is not None
    q, p = torch.empty(2, 5, device="meta"), torch.empty(4, 2, device="meta")
    x = torch.empty(3, 5, device="meta")
    assert add_low_rank(base, x, base.module(x), q=q, p=p, scale=1.0).shape == (3, 4)
    assert low_rank_delta(base, q=q, p=p, scale=1.0).shape == (4, 5)


@pytest.mark.parametrize("name", LAYERS)
def test_it_traces_as_one_graph(name: str) -> None:
    """torch.compile finds no graph break, so a compiled model stays one graph."""
    importlib.import_module("torch._dynamo").reset()
    base, x = layer(name)
    factors = triplets(base, 2)

    def add(x: Tensor) -> Tensor:
        return add_low_rank(base, x, base.module(x), scale=2.0, **factors)

    compiled = torch.compile(add, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), add(x), rtol=1e-10, atol=1e-10)
