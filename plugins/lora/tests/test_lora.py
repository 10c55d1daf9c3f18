"""The LoRA adapter: its initialisation, scale and dropout, and its training compared with PEFT's."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support import between
from tunerkit_lora import LoraConfig
from tunerkit_lora.adapter import LoraAdapter

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def wrapped(**config: Any) -> Net:
    return tunerkit.wrap(Net(), "lora", LoraConfig(targets=("first", "second"), **config), seed=0)


def adapters(model: nn.Module) -> dict[str, LoraAdapter]:
    return {p: a for p, a in tunerkit.tuner(model).adapters().items() if isinstance(a, LoraAdapter)}


def train(model: nn.Module, count: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), LABELS)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_every_start_keeps_the_output(start: str) -> None:
    """B is 0 and A is not: the output is the base's bit for bit, and there is a gradient."""
    model = wrapped(start=start)
    assert torch.equal(model(X), Net()(X))
    for adapter in adapters(model).values():
        assert not adapter.b.any()
        assert adapter.a.all()
    losses = train(model, 5)
    assert losses[-1] < losses[0]
    assert all(bool(adapter.b.any()) for adapter in adapters(model).values())


def test_starts_are_spread_as_said() -> None:
    """Kaiming: uniform within 1/√in; Gaussian: a standard deviation of 1/rank."""
    torch.manual_seed(0)
    for start, deviation in (("kaiming", 1 / math.sqrt(3 * 400)), ("gaussian", 1 / 50)):
        model = tunerkit.wrap(nn.Sequential(nn.Linear(400, 4)), "lora", {"targets": ["0"], "rank": 50, "start": start})
        (adapter,) = adapters(model).values()
        assert float(adapter.a.detach().std()) == pytest.approx(deviation, rel=0.03)
        assert float(adapter.a.detach().mean()) == pytest.approx(0, abs=deviation / 30)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_output_is_the_base_s_plus_scale_times_b_a_x(rslora: bool) -> None:
    """As in the formula, with a separate rank and alpha at one target, and also merged."""
    model = wrapped(rank=4, alpha=12.0, rslora=rslora, rank_pattern={"second": 2}, alpha_pattern={"second": 5.0})
    assert tunerkit.tuner(model).ranks() == {"first": 4, "second": 2}
    assert tunerkit.tuner(model).budget() == tunerkit.tuner(model).budget(100) == 6
    train(model, 10)
    base, inputs = Net(), {"first": X, "second": torch.tanh(model.first(X))}
    for path, scale in (("first", 12.0 / (2.0 if rslora else 4)), ("second", 5.0 / (math.sqrt(2) if rslora else 2))):
        adapter, x = adapters(model)[path], inputs[path]
        expected = base.get_submodule(path)(x) + scale * (x @ adapter.a.T @ adapter.b.T)
        torch.testing.assert_close(model.get_submodule(path)(x), expected)
        merged = tunerkit.merge(model).get_submodule(path)(x)
        torch.testing.assert_close(merged, expected)
        tunerkit.unmerge(model)


def test_dropout_changes_the_training_output_only() -> None:
    """It has no effect in eval and at the start (B is 0).

    In training two passes differ, and average to the one without.
    """
    model = wrapped(dropout=0.5)
    assert torch.equal(model.train()(X), Net()(X))
    train(model, 10)
    plain = wrapped()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(X), plain.eval()(X))
    model.train()
    assert not torch.equal(model(X), model(X))
    mean = torch.stack([model.first(X) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, plain.first(X), rtol=0, atol=0.05)
    with tunerkit.disabled(model):
        assert torch.equal(model(X), Net()(X))


@pytest.mark.parametrize("shape", between.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", between.DTYPES, ids=str)
@pytest.mark.parametrize("scenario", between.SCENARIOS)
def test_what_is_replaced_between_two_reads_ends_as_in_the_plain_form(
    scenario: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Nothing of an input or a weight is remembered from one read to the next."""
    between.agree("lora", {}, scenario, shape, dtype)


@pytest.mark.parametrize("rslora", [False, True])
def test_it_learns_what_pefts_lora_learns(rslora: bool) -> None:
    """From the same start, over 50 AdamW steps, every loss is within 1e-4 of PEFT's."""
    peft = pytest.importorskip("peft", reason="peft is the peer that this test compares with")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["first", "second"], use_rslora=rslora, rank_pattern={"second": 2}
    )
    theirs = peft.get_peft_model(Net(), config)
    model = wrapped(rank=4, alpha=6.0, rslora=rslora, rank_pattern={"second": 2})
    for path, adapter in adapters(model).items():
        layer = theirs.base_model.model.get_submodule(path)
        with torch.no_grad():
            adapter.a.copy_(layer.lora_A["default"].weight)
            adapter.b.copy_(layer.lora_B["default"].weight)
    expected, found = train(theirs, 50), train(model, 50)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[-1] < found[0] - 0.1


def test_training_needs_no_attachment_and_saving_no_step(tmp_path: Any) -> None:
    """LoRA's ranks are constant: an untrained adapter can be saved, and loads as one that changes nothing."""
    path = tunerkit.save(wrapped(), tmp_path)
    assert torch.equal(tunerkit.load(Net(), path)(X), Net()(X))


def test_an_adapter_is_printed_with_its_rank_and_scale() -> None:
    """One line; dropout if there is some."""
    (first, _) = adapters(wrapped(rank=2, alpha=3.0)).values()
    assert repr(first) == "LoraAdapter(rank=2, scale=1.5)"
    (first, _) = adapters(wrapped(rank=2, dropout=0.1)).values()
    assert repr(first) == "LoraAdapter(rank=2, scale=2, dropout=0.1)"
