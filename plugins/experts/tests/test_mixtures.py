"""Adapters on the experts of eight mixtures: equal to dense experts, trained, saved, loaded, merged and taken out."""

from pathlib import Path
from typing import Any

import pytest
import torch
import tunerkit_experts
from torch import Tensor

import tunerkit
from plugins.experts.tests.mixtures import MIXTURES, adamw, dense_experts, loss_of, mixture, tokens, train

METHODS: dict[str, dict[str, object]] = {
    "lora": {"rank": 3},
    "adalora": {"target_rank": 2, "init_rank": 3, "t_init": 2, "t_final": 2, "delta_t": 2},
}
CASES = [(name, method) for name in MIXTURES for method in METHODS]
FORMS = ("eager", "grouped_mm", "batched_mm")


def wrapped(name: str, method: str = "lora", **options: Any) -> Any:
    """A tiny mixture with adapters that add something."""
    model = tunerkit.wrap(mixture(name, **options), method, METHODS[method], seed=0)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def outputs_and_gradients(model: Any) -> list[Tensor]:
    """The logits, and the gradient of each parameter of the adapter."""
    logits = model(input_ids=tokens()).logits
    model.zero_grad()
    loss_of(model).backward()
    grads: list[Any] = [parameter.grad for parameter in tunerkit.tuner(model).parameters()]
    return [logits.detach(), *(grad.clone() for grad in grads)]


def farthest(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max().clamp_min(1e-30)) for one, other in pairs)


def off_by(model: Any) -> float:
    """How far a model's outputs and gradients are from those of dense experts with W + ΔW."""
    found = outputs_and_gradients(model)
    with dense_experts(model):
        return farthest(found, outputs_and_gradients(model))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_experts_compute_what_dense_experts_do(name: str, method: str, dtype: torch.dtype, tolerance: float) -> None:
    """Law: outputs and gradients equal those of a loop over experts with W + ΔW."""
    config = {**METHODS[method], "adapter_dtype": str(dtype).removeprefix("torch.")}
    model = tunerkit.wrap(mixture(name, dtype=dtype), method, config, seed=0)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert off_by(model) < tolerance


@pytest.mark.parametrize(("name", "method"), CASES)
def test_experts_are_trained_saved_loaded_merged_and_taken_out(name: str, method: str, tmp_path: Path) -> None:
    """Law: each expert with a token moves, files and merges keep the output, and the base comes back bit for bit."""
    model = mixture(name)
    keys, base = list(model.state_dict()), model(input_ids=tokens()).logits
    tunerkit.wrap(model, method, METHODS[method], seed=0)
    assert torch.equal(model(input_ids=tokens()).logits, base)
    optimizer = adamw(model)
    tunerkit.attach(model, optimizer, total_steps=24)
    start = [parameter.clone() for parameter in stacked(model)]
    used = [torch.zeros(len(parameter), dtype=torch.bool) for parameter in start]
    tuner = tunerkit.tuner(model)
    for step in range(24):
        model.train()
        loss_of(model, step).backward()
        for seen, parameter in zip(used, stacked(model), strict=True):
            seen |= parameter.grad.flatten(1).any(1)
        optimizer.step()
        optimizer.zero_grad()
        assert sum(tuner.ranks().values()) == tuner.budget() or method == "lora"
    model.eval()
    for seen, before, after in zip(used, start, stacked(model), strict=True):
        assert torch.equal((before != after).flatten(1).any(1), seen)
    assert any(bool(seen.any()) for seen in used)
    trained = model(input_ids=tokens()).logits
    tunerkit.save(model, tmp_path)
    tunerkit.merge(model)
    assert farthest([model(input_ids=tokens()).logits], [trained]) < 1e-5
    with tunerkit.disabled(model):
        assert torch.equal(model(input_ids=tokens()).logits, base)
    tunerkit.unmerge(model)
    assert torch.equal(model(input_ids=tokens()).logits, trained)
    assert [key for key in model.state_dict() if ".tunerkit." not in key] == keys
    tunerkit.unwrap(model)
    assert torch.equal(model(input_ids=tokens()).logits, base)
    assert list(model.state_dict()) == keys
    tunerkit.load(model, tmp_path)
    assert farthest([model(input_ids=tokens()).logits], [trained]) < 1e-6


def stacked(model: Any) -> list[Any]:
    """The adapter's parameters with a dimension for the experts that start at 0, and so move with any gradient."""
    tuner = tunerkit.tuner(model)
    names = {"lora": "b", "adalora": "p"}
    own = tuner.adapters()
    return [own[t.path].get_parameter(names[tuner.method]) for t in tuner.targets if ".stacks." in t.path]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_training_resumes_bit_for_bit_after_each_step(name: str, method: str, tmp_path: Path) -> None:
    """Law: a training that is stopped after any of nine steps ends with the weights of one that was not."""
    config = METHODS[method]

    def begun(place: Path | None) -> tuple[Any, torch.optim.Optimizer]:
        model = mixture(name)
        if place is None:
            tunerkit.wrap(model, method, config, seed=0)
        else:
            tunerkit.load(model, place, trainable=True)
        optimizer = adamw(model)
        tunerkit.attach(model, optimizer, total_steps=10)
        return model, optimizer

    model, optimizer = begun(None)
    for step in range(9):
        train(model, 1, optimizer=optimizer, first=step)
        tunerkit.save(model, tmp_path / str(step))
        tunerkit.save_state(model, tmp_path / str(step))
        torch.save(optimizer.state_dict(), tmp_path / str(step) / "optimizer.pt")
    train(model, 1, optimizer=optimizer, first=9)
    whole = [parameter.clone() for parameter in tunerkit.tuner(model).parameters()]
    for step in range(9):
        again, other = begun(tmp_path / str(step))
        tunerkit.load_state(again, tmp_path / str(step))
        other.load_state_dict(torch.load(tmp_path / str(step) / "optimizer.pt"))
        train(again, 9 - step, optimizer=other, first=step + 1)
        assert all(map(torch.equal, tunerkit.tuner(again).parameters(), whole)), step


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "Llama-4"])
def test_adapters_that_add_nothing_change_no_bit_of_any_form(name: str, form: str) -> None:
    """Law: with ΔW = 0, each of transformers' implementations keeps its own output, and all agree with adapters."""
    model = mixture(name, form=form)
    before = model(input_ids=tokens()).logits
    tunerkit.wrap(model, "lora", {"rank": 4, "targets": ["experts"]}, seed=0)
    assert torch.equal(model(input_ids=tokens()).logits, before)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    found = model(input_ids=tokens()).logits
    model.set_experts_implementation("eager")
    assert farthest([found], [model(input_ids=tokens()).logits]) < 1e-5


def test_each_expert_has_a_rank() -> None:
    """Law: `ranks` lists one number for each expert of each stack, and leaves ordinary layers out."""
    tuner = tunerkit.tuner(wrapped("Mixtral"))
    found = tunerkit_experts.ranks(tuner)
    assert set(found) == {path for path in tuner.ranks() if ".stacks." in path}
    assert all(ranks == [3] * 4 for ranks in found.values())
