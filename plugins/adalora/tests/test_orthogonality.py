"""The orthogonality regulariser compared with loops, and its gradient with finite differences."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import Parameter

from tunerkit.errors import ConfigError
from tunerkit_adalora.orthogonality import Form, add_gradient_, penalty

FORMS: tuple[Form, ...] = get_args(Form)
Pairs = list[tuple[Parameter, Parameter]]


@st.composite
def pairs(draw: st.DrawFn, least: int = 1) -> Pairs:
    """Up to four pairs of any small shapes, including equal ones and rank 0, in float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 4)), min_size=least, max_size=4)
    )
    return [
        (Parameter(torch.tensor(rng.normal(size=(o, r)))), Parameter(torch.tensor(rng.normal(size=(r, i)))))
        for o, r, i in shapes
    ]


def slow_norms(given_pairs: Pairs) -> list[float]:
    """‖PᵀP − I‖_F and ‖QQᵀ − I‖_F, entry by entry."""
    norms = []
    for p, q in given_pairs:
        for m in (p.detach().numpy().T, q.detach().numpy()):
            entries = [(float(np.dot(m[i], m[j])) - (i == j)) ** 2 for i in range(len(m)) for j in range(len(m))]
            norms.append(math.sqrt(sum(entries)))
    return norms


def slow_penalty(given_pairs: Pairs, form: Form) -> float:
    """The penalty from the slow norms."""
    norms = slow_norms(given_pairs)
    return sum(n**2 for n in norms) if form == "paper" else sum(norms) / len(norms)


def matrices(given_pairs: Pairs) -> list[Parameter]:
    """P and Q of every pair, alternating."""
    return [m for pair in given_pairs for m in pair]


def differences(given_pairs: Pairs, form: Form, matrix: Parameter) -> Tensor:
    """The slope of the slow penalty in each entry of one matrix, by central differences."""
    slope, h = torch.zeros_like(matrix.detach()), 1e-5
    for at in np.ndindex(tuple(matrix.shape)):
        ends = []
        for sign in (1, -1):
            old = matrix.data[at].item()
            matrix.data[at] = old + sign * h
            ends.append(slow_penalty(given_pairs, form))
            matrix.data[at] = old
        slope[at] = (ends[0] - ends[1]) / (2 * h)
    return slope


@given(pairs(), st.sampled_from(FORMS))
@settings(deadline=None)
def test_the_penalty_is_the_formula_entry_by_entry(some: Pairs, form: Form) -> None:
    """Both forms equal loops over single entries."""
    assert penalty(some, form=form).item() == pytest.approx(slow_penalty(some, form), rel=1e-12, abs=1e-12)


@given(pairs(), st.sampled_from(FORMS), st.floats(0.01, 10))
@settings(max_examples=60, deadline=None)
def test_the_gradient_is_the_slope_of_the_penalty(some: Pairs, form: Form, gamma: float) -> None:
    """Each gradient increases by γ times the slope from finite differences."""
    for m in matrices(some):
        m.grad = torch.ones_like(m)
    add_gradient_(some, gamma=gamma, form=form)
    for m in matrices(some):
        assert m.grad is not None
        torch.testing.assert_close(m.grad, 1 + gamma * differences(some, form, m), rtol=1e-5, atol=1e-5)


@given(pairs(), st.sampled_from(FORMS), st.integers(-8, 16))
@settings(max_examples=40)
def test_the_gradient_grows_with_the_scale_of_the_gradients(some: Pairs, form: Form, power: int) -> None:
    """With a GradScaler's 2^k the added part is exactly 2^k times as large, like the loss's gradients."""
    plain = added(some, form, None)
    scaled = added(some, form, torch.tensor(2.0**power))
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(a * 2.0**power, b)


def added(some: Pairs, form: Form, grad_scale: Tensor | None) -> list[Tensor]:
    """The amount that add_gradient_ adds to zero gradients."""
    for m in matrices(some):
        m.grad = torch.zeros_like(m)
    add_gradient_(some, gamma=0.3, form=form, grad_scale=grad_scale)
    return [m.grad for m in matrices(some) if m.grad is not None]


@given(pairs(least=2), st.sampled_from(FORMS), st.data())
@settings(max_examples=40)
def test_matrices_without_a_gradient_or_frozen_are_left_alone_but_count(
    some: Pairs, form: Form, data: st.DataObject
) -> None:
    """The others get the same gradient as if all had been used: the mean is over all matrices."""
    everything = added(some, form, None)
    for m in matrices(some):
        m.grad = torch.zeros_like(m)
    unused = data.draw(st.sampled_from(range(len(some))))
    frozen = data.draw(st.sampled_from(range(len(some))))
    some[unused][0].grad = None
    some[frozen][1].requires_grad_(False)
    add_gradient_(some, gamma=0.3, form=form)
    for m, full in zip(matrices(some), everything, strict=True):
        if m is some[unused][0]:
            assert m.grad is None
        elif m is some[frozen][1]:
            assert m.grad is not None
            assert not m.grad.any()
        else:
            assert m.grad is not None
            torch.testing.assert_close(m.grad, full, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_matrices_cost_nothing_and_are_not_pulled(form: Form) -> None:
    """At the minimum, penalty and gradient are 0, even for the unsquared norm, which is not differentiable there."""
    some = [(Parameter(torch.eye(4, 2)), Parameter(torch.eye(2, 5)))]
    assert penalty(some, form=form).item() == 0
    assert all(not grad.any() for grad in added(some, form, None))


@pytest.mark.parametrize("form", FORMS)
def test_a_step_down_the_gradient_lowers_the_penalty(form: Form) -> None:
    """The gradient has the right sign."""
    torch.manual_seed(0)
    some = [(Parameter(torch.randn(6, 3)), Parameter(torch.randn(3, 5)))]
    before = penalty(some, form=form).item()
    for m, grad in zip(matrices(some), added(some, form, None), strict=True):
        m.data -= 1e-2 * grad
    assert penalty(some, form=form).item() < before


def test_no_pull_asked_for_touches_nothing() -> None:
    """γ = 0 leaves gradients bit-identical, even if weights are not finite."""
    p = Parameter(torch.full((2, 2), torch.inf))
    p.grad = torch.full((2, 2), -0.0)
    add_gradient_([(p, p)], gamma=0.0, form="paper")
    assert torch.equal(p.grad, torch.zeros(2, 2))


def test_narrow_weights_are_measured_in_fp32() -> None:
    """An fp16 product would overflow here; the gradient keeps its parameter's dtype."""
    p = Parameter(torch.full((3, 1), 300.0, dtype=torch.float16))
    q = Parameter(torch.ones(1, 1, dtype=torch.float16))
    assert penalty([(p, q)], form="reference").item() == pytest.approx((3 * 300**2 - 1) / 2)
    p.grad = torch.zeros_like(p)
    add_gradient_([(p, q)], gamma=0.5, form="reference")
    assert p.grad.dtype == torch.float16
    assert p.grad.flatten().tolist() == [150.0] * 3  # γ · 2 · 300 / 2


@given(pairs(), st.sampled_from(FORMS))
@settings(max_examples=20)
def test_the_penalty_itself_is_differentiable_to_the_same_gradient(some: Pairs, form: Form) -> None:
    """If you add the term to a loss, autograd gives the gradient that add_gradient_ adds."""
    by_hand = added(some, form, None)
    by_autograd = torch.autograd.grad(0.3 * penalty(some, form=form), matrices(some))
    for ours, expected in zip(by_hand, by_autograd, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_no_pairs_are_no_penalty() -> None:
    """Without adapted layers, nothing is added."""
    assert penalty([], form="paper").item() == 0
    add_gradient_([], gamma=1.0, form="reference")


def test_an_unknown_form_is_refused_with_the_known_ones() -> None:
    """The error for a mistyped form has the allowed ones and the closest."""
    with pytest.raises(ConfigError, match=r"orthogonality: .*paper, reference, got 'papr'; did you mean 'paper'"):
        penalty([], form="papr")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got 'papr'"):
        add_gradient_([], gamma=1.0, form="papr")  # type: ignore[arg-type]
