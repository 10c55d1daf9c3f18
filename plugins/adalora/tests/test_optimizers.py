"""AdaLoRA with every form of an optimizer's step, and with realistic gradients."""

import functools
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import tunerkit
from plugins.adalora.tests.short_training import layers
from tests.support.lengths import is_long
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import TARGETS, closure_of, loss_of, net, train, trainable

TOTAL = 24
# Allocations at 6, 9, 12, 15 and 16, where the ranks are final and memory shrinks.
SETTINGS: dict[str, Any] = {
    "target_rank": 2, "init_rank": 4, "t_init": 4, "t_final": 8, "delta_t": 3, "gamma": 0.1, "targets": TARGETS
}  # fmt: skip
BUDGET = 6

KINDS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}


def started(kind: str, **changes: Any) -> tuple[nn.Module, torch.optim.AdamW]:
    model: nn.Module = tunerkit.wrap(net(), "adalora", {**SETTINGS, **changes}, seed=0)
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
    skipped = (0, 5, 9, 20)
    for number in range(TOTAL + len(skipped)):
        optimizer.zero_grad()
        loss = loss_of(model) * (1e38 if number in skipped else 1.0)
        scale.scale(loss).backward()  # type: ignore[no-untyped-call]
        scale.step(optimizer)
        scale.update()


@functools.cache
def of_foreach(**changes: Any) -> nn.Module:
    """A model after the plain loop with the foreach form, which the others are compared with."""
    model, optimizer = started("foreach", **changes)
    plain(model, optimizer)
    return model


LAMBDA: list[dict[str, Any]] = [{"gamma": 0.1}, {"gamma": 0.0, "exact_svd": True}]


@pytest.mark.parametrize("changes", LAMBDA, ids=["lambda trained", "lambda held"])
@pytest.mark.parametrize("form", [plain, closure, accumulation, scaler], ids=lambda form: form.__name__)
def test_every_kind_of_adamw_gives_the_same_masks_in_every_form(form: Any, changes: dict[str, Any]) -> None:
    """Foreach, fused and loop: each allocation has the ranks of the plain loop, and the final budget is exact."""
    expected = tunerkit.tuner(of_foreach(**changes)).history
    assert [change.step for change in expected] == [6, 9, 12, 15, 16]
    for kind in KINDS:
        model, optimizer = started(kind, **changes)
        form(model, optimizer)
        tuner = tunerkit.tuner(model)
        assert tuner.history == expected
        assert tuner.steps == TOTAL
        assert sum(tuner.ranks().values()) == sum(len(layer.lam) for layer in layers(model)) == BUDGET
        assert all(bool(p.isfinite().all()) for p in tuner.parameters())


@pytest.mark.parametrize("changes", LAMBDA, ids=["lambda trained", "lambda held"])
@pytest.mark.parametrize("form", [plain, closure, accumulation, scaler], ids=lambda form: form.__name__)
def test_masks_agree_triplet_by_triplet(form: Any, changes: dict[str, Any]) -> None:
    """With every triplet kept in memory, masks are equal elementwise over kinds and forms, not only in counts."""
    expected = [layer.mask for layer in layers(of_foreach(shrink=False, **changes))]
    for kind in KINDS:
        model, optimizer = started(kind, shrink=False, **changes)
        form(model, optimizer)
        assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), expected, strict=True))


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
    budget = BUDGET if unit == "rank" else 90
    model, _ = started("foreach", target_rank=None, budget=budget, budget_unit=unit, shrink=False)
    tuner = tunerkit.tuner(model)
    own = list(tuner.parameters())
    optimizer = torch.optim.SGD(own, lr=0.05)
    tunerkit.steps.detach(tuner)
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
            with torch.no_grad():  # the optimizer moved these weights by NaN; an optimizer that skips them would not
                for index in harmed:
                    own[index].copy_(kept[index])
            training = training_of(tuner)
            assert all(bool(t.isfinite().all()) for t in itertools.chain(*training.averages))
    costs = [15, 16, 11] if unit == "parameters" else [1, 1, 1]
    spent = sum(cost * rank for cost, rank in zip(costs, tuner.ranks().values(), strict=True))
    assert tuner.budget() == budget
    assert spent == budget if unit == "rank" else budget - max(costs) < spent <= budget


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=["plain", "bf16", "fp16"])
def test_adapters_of_every_precision_prune_to_the_budget(dtype: str, autocast: torch.dtype | None) -> None:
    """fp16, bf16 and fp32 weights, with autocast and without: the averages are fp32, every weight finite at the end."""
    model, optimizer = started("foreach", adapter_dtype=dtype)
    optimizer.param_groups[0]["eps"] = 1e-4  # AdamW's 1e-8 is 0 in fp16, and a gradient of 0 becomes 0/0
    for _ in range(TOTAL):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        training = training_of(tunerkit.tuner(model))
        assert all(t.dtype == torch.float32 for t in itertools.chain(*training.averages))
    tuner = tunerkit.tuner(model)
    assert sum(tuner.ranks().values()) == sum(len(layer.lam) for layer in layers(model)) == BUDGET
    assert all(p.dtype == getattr(torch, dtype) and bool(p.isfinite().all()) for p in tuner.parameters())


@pytest.mark.parametrize("clip", [1e-3, 1.0])
def test_clipped_gradients_rank_what_was_stepped_with(clip: float) -> None:
    """Clipping scales all gradients of a step equally: its scores scale too, and the budget stays exact."""
    model, optimizer = started("foreach", gamma=0.0)
    for _ in range(TOTAL):
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(tunerkit.tuner(model).parameters(), clip)
        optimizer.step()
    assert sum(tunerkit.tuner(model).ranks().values()) == BUDGET


class Drops(nn.Module):
    """Skips its middle layer in every second forward, as LayerDrop does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.calls += 1
        result: Tensor = self.last(h if self.calls % 2 else torch.tanh(self.middle(h)))
        return result


@pytest.mark.filterwarnings("ignore:these adapters never ran")
def test_a_layer_that_is_dropped_now_and_then_keeps_its_averages_meanwhile() -> None:
    """A step without its gradient doesn't change a layer's averages, and the layer may keep rank."""
    model = tunerkit.wrap(
        Drops(), "adalora", {**SETTINGS, "targets": "all-linear", "gamma": 0.0, "exact_svd": False}, seed=0
    )
    optimizer = torch.optim.AdamW(tunerkit.tuner(model).parameters(), lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    for number in range(TOTAL):
        optimizer.zero_grad()
        before = [t.clone() for t in training_of(tunerkit.tuner(model)).averages[0]]
        loss_of(model).backward()
        optimizer.step()
        after = training_of(tunerkit.tuner(model)).averages[0]
        if number % 2 == 0 and after:
            assert all(torch.equal(a, b) for a, b in zip(after[3:6], before[3:6], strict=True))
    assert sum(tunerkit.tuner(model).ranks().values()) == BUDGET
