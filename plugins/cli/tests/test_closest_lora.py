"""`tunerkit convert --to lora`: the closest LoRA of an adapter of any method, and what it leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.tiny_models import save_tiny_llama
from tests.support.train_command import command, succeeded
from tunerkit_transformers.bases import Base, whole

pytest.importorskip("tunerkit_methods")
IDS = torch.tensor([[1, 2, 3, 4]])
# Of products; of a matrix; of one that needs the base's weights; of one that starts from them; of biases too.
METHODS = ("vera", "loha", "oft", "delora", "ia3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with biases, and an adapter of each method."""
    path = tmp_path_factory.mktemp("closest")
    save_tiny_llama(path / "llama")
    for method in METHODS:
        model = tunerkit.wrap(base(path), method, {"targets": ["q_proj", "down_proj"]}, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in tunerkit.tuner(model).parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        tunerkit.save(model, path / method)
    return path


def base(path: Path) -> Any:
    """The base with its weights."""
    return whole(Base(str(path / "llama"), "AutoModelForCausalLM"))


def added(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """What merging adds to each weight: the slow way to the deltas."""
    own = dict(plain.named_parameters())
    tunerkit.unwrap(model, keep_merged=True)
    found = {name: parameter.detach().double() - own[name].double() for name, parameter in model.named_parameters()}
    return {name: each for name, each in found.items() if name.endswith(("q_proj.weight", "down_proj.weight"))}


@pytest.mark.parametrize("method", METHODS)
def test_the_closest_lora_leaves_out_the_smallest_singular_values(folder: Path, tmp_path: Path, method: str) -> None:
    """The error that is printed is that of the file, and no product of the rank is closer."""
    options = ("--base", folder / "llama", "--task", "causal-lm", "--json")
    told = json.loads(
        succeeded("convert", folder / method, "--to", "lora", "--rank", 3, "--out", tmp_path / "out", *options).stdout
    )
    wanted = added(tunerkit.load(base(folder), folder / method), base(folder))
    held = added(tunerkit.load(base(folder), tmp_path / "out"), base(folder))
    for name, delta in wanted.items():
        path = name.removesuffix(".weight")
        size, tail = delta.norm(), torch.linalg.svdvals(delta)[3:].norm()
        assert float((delta - held[name]).norm() / size) == pytest.approx(float(tail / size), abs=1e-5)
        assert told["errors"][path] == pytest.approx(float(tail / size), abs=1e-5)
    total = sum(float((delta - held[name]).square().sum()) for name, delta in wanted.items())
    assert told["error"] == pytest.approx(
        (total / sum(float(each.square().sum()) for each in wanted.values())) ** 0.5, abs=1e-5
    )
    assert max(told["ranks"].values()) <= 3
    assert next(iter(told["errors"].values())) == max(told["errors"].values())


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_that_is_large_enough_loses_nothing(folder: Path, tmp_path: Path, method: str) -> None:
    """Then the model computes the same; what the method adds to biases becomes trained biases."""
    succeeded(
        *("convert", folder / method, "--to", "lora", "--rank", 64, "--out", tmp_path / "out"),
        *("--base", folder / "llama", "--task", "causal-lm"),
    )
    with torch.no_grad():
        expected = tunerkit.load(base(folder), folder / method)(IDS).logits
        found = tunerkit.load(base(folder), tmp_path / "out")(IDS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_rank_is_asked_for(folder: Path, tmp_path: Path) -> None:
    """There is no default: how much may be lost is the user's to say. Other formats have options of their own."""
    for arguments in (("--to", "lora"), ("--to", "lora", "--rank", 0), ("--to", "peft", "--rank", 4)):
        result = command("convert", folder / "loha", *arguments, "--out", tmp_path / "out", "--base", folder / "llama")
        assert result.exit_code != 0
        assert "--to lora needs the largest rank of a target" in result.stderr
    assert not (tmp_path / "out").exists()


def test_norms_have_no_lora(folder: Path, tmp_path: Path) -> None:
    """A LoRA adds to the weights of layers, so the error says to merge."""
    model = tunerkit.wrap(base(folder), "ln-tuning", {})
    tunerkit.save(model, tmp_path / "norms")
    options = ("--base", folder / "llama", "--task", "causal-lm")
    result = command("convert", tmp_path / "norms", "--to", "lora", "--rank", 4, "--out", tmp_path / "out", *options)
    assert result.exit_code != 0
    assert "adapts norms" in result.stderr
    assert "tunerkit merge" in result.stderr
