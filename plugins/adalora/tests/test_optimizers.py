"""AdaLoRA with every form of an optimizer's step, and with gradients that are no numbers."""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import tunerkit
from plugins.adalora.tests.short_training import KINDS, TOTAL, layers, wrapped
from tests.support.lengths import is_long
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import closure_of, loss_of, train, trainable


def started(kind: str, **changes: Any) -> tuple[nn.Module, torch.optim.AdamW]:
    model = wrapped(**{"gamma": 0.1, **changes})
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, **KINDS[kind])
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    return model, optimizer


def plain(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    train(model, optimizer, TOTAL)


def closure(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    again = closure_of(model, optimizer)
    for number in range(TOTAL):
        # Both ways in which a closure can be handed over.
        optimizer.step(again) if number % 2 else optimizer.step(closure=again)


def accumulation(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    for _ in range(TOTAL):
        optimizer.zero_grad()
        for begin in range(0, 8, 2):
            loss_of(model, slice(begin, begin + 2)).backward()
        optimizer.step()


def scaler(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """The default scale of 2**16; four batches overflow and their steps are skipped, one at an allocation."""
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    skipped = (0, 5, 9, 18)
    for number in range(TOTAL + len(skipped)):
        optimizer.zero_grad()
        loss = loss_of(model) * (1e38 if number in skipped else 1.0)
        scale.scale(loss).backward()  # type: ignore[no-untyped-call]
        scale.step(optimizer)
        scale.update()


FORMS: dict[str, Callable[[nn.Module, torch.optim.AdamW], None]] = {
    each.__name__: each for each in (plain, closure, accumulation, scaler)
}
LAMBDA: dict[str, dict[str, Any]] = {"λ trained": {"gamma": 0.1}, "λ held": {"gamma": 0.0, "exact_svd": True}}


@functools.cache
def of_foreach(how: str) -> nn.Module:
    """A model after the plain loop with the foreach form, which the others are compared with."""
    model, optimizer = started("foreach", **LAMBDA[how])
    plain(model, optimizer)
    return model


@pytest.mark.parametrize("how", LAMBDA)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_adamw_gives_the_same_masks_in_every_form(form: str, kind: str, how: str) -> None:
    """Each allocation has the ranks of the plain loop, and the final masks are the same, triplet by triplet."""
    expected = of_foreach(how)
    model, optimizer = started(kind, **LAMBDA[how])
    FORMS[form](model, optimizer)
    tuner = tunerkit.tuner(model)
    assert tuner.history == tunerkit.tuner(expected).history
    assert [change.step for change in tuner.history] == [6, 9, 12, 14]
    assert tuner.steps == TOTAL
    for layer, other in zip(layers(model), layers(expected), strict=True):
        assert torch.equal(layer.mask, other.mask)
    assert all(bool(p.isfinite().all()) for p in tuner.parameters())


INJECTED = st.sampled_from([math.nan, math.inf, -math.inf, None])


@given(
    bad=st.dictionaries(st.tuples(st.integers(0, TOTAL - 1), st.integers(1, 8)), INJECTED, max_size=80),
    unit=st.sampled_from(["rank", "parameters"]),
)
@settings(max_examples=200 if is_long() else 60, deadline=None)
def test_bad_gradients_anywhere_leave_averages_finite_and_the_budget_exact(
    bad: dict[tuple[int, int], float | None], unit: str
) -> None:
    """NaN, ±inf or None in any weight's gradient but the first one's, at any steps, is skipped, never averaged."""
    budget, costs = (6, (1, 1, 1)) if unit == "rank" else (90, (15, 16, 11))
    model = wrapped(target_rank=None, budget=budget, budget_unit=unit, gamma=0.1)
    tuner, own = tunerkit.tuner(model), trainable(model)
    optimizer = torch.optim.SGD(own, lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
        for number in range(TOTAL):
            optimizer.zero_grad()
            loss_of(model).backward()
            kept = [p.detach().clone() for p in own]
            harmed = {index: value for (step, index), value in bad.items() if step == number}
            for index, value in harmed.items():
                own[index].grad = None if value is None else torch.full_like(own[index], value)
            optimizer.step()
            for index in harmed:  # the optimizer moved these weights by NaN; one that skips them would not
                own[index].data.copy_(kept[index])
            assert all(bool(t.isfinite().all()) for t in itertools.chain(*training_of(tuner).averages))
    spent = sum(cost * rank for cost, rank in zip(costs, tuner.ranks().values(), strict=True))
    assert tuner.budget() == budget
    assert budget - max(costs) < spent <= budget
