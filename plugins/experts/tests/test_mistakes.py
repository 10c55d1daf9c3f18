"""Four mistakes that were made elsewhere, planted: the comparison with dense experts finds each."""

import pytest
import torch
from torch import Tensor
from tunerkit_experts.stacks import StackLayer

import tunerkit
from plugins.experts.tests.mixtures import mixture, tokens
from plugins.experts.tests.test_mixtures import farthest, off_by, wrapped


def swap_halves(p: Tensor) -> Tensor:
    """Gate and up in each other's place."""
    gate, up = p.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1)


def test_rows_of_another_expert_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: an adapter whose rows are shifted by one differs from dense experts."""
    project = StackLayer.project_in

    def shift(self: StackLayer, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        return project(self, x, q, dropout).roll(1, dims=0)

    model = wrapped("Mixtral")
    assert off_by(model) < 1e-5
    monkeypatch.setattr(StackLayer, "project_in", shift)
    assert off_by(model) > 1e-3


def test_gate_and_up_in_each_others_place_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: an adapter that adds gate's product to up differs from dense experts."""
    project = StackLayer.project_out

    def swap(self: StackLayer, h: Tensor, p: Tensor) -> Tensor:
        return project(self, h, swap_halves(p) if self.weight_name == "gate_up_proj" else p)

    model = wrapped("Mixtral")
    monkeypatch.setattr(StackLayer, "project_out", swap)
    assert off_by(model) > 1e-3


def test_a_transposed_factor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: ΔW that is added to a stack of square matrices in the wrong layout differs after a merge."""
    model = wrapped("square")
    before = model(input_ids=tokens()).logits
    assert farthest([tunerkit.merge(model)(input_ids=tokens()).logits], [before]) < 1e-5
    tunerkit.unmerge(model)
    packed = StackLayer.pack
    monkeypatch.setattr(
        StackLayer, "pack", lambda self, weight: weight if weight.shape[1] == weight.shape[2] else packed(self, weight)
    )
    assert farthest([tunerkit.merge(model)(input_ids=tokens()).logits], [before]) > 1e-3


def test_adapters_on_shared_experts_are_not_those_of_routed_ones() -> None:
    """Law: a plain name means stacks and shared experts alike, and `experts` the routed ones alone."""
    both = tunerkit.wrap(mixture("DeepSeek-V3"), "lora", {"targets": ["down_proj"]})
    paths = [target.path for target in tunerkit.tuner(both).targets]
    assert any("shared_experts.down_proj" in path for path in paths)
    assert any("experts.stacks.down_proj" in path for path in paths)
    routed = tunerkit.wrap(mixture("DeepSeek-V3"), "lora", {"targets": ["experts"]})
    assert [target.path for target in tunerkit.tuner(routed).targets] == [
        f"model.layers.1.mlp.experts.stacks.{name}" for name in ("gate_up_proj", "down_proj")
    ]
