"""What a check of an engine finds: nothing where it is right, and the cause of each planted mistake."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("tunerkit_peft", reason="the format comes with it")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

import tunerkit
from plugins.serving.tests.serving_folders import random_folder
from plugins.serving.tests.stub_vllm import StubVllm, perturb_
from tunerkit_serving import VllmServer, check_rollout, publisher

Tensors = dict[str, torch.Tensor]


def wrapped(folder: Path, method: str = "lora", **config: Any) -> Any:
    torch.manual_seed(0)
    model = tunerkit.wrap(AutoModelForCausalLM.from_pretrained(folder), method, config or {"rank": 4})
    if method == "adalora":  # which is published after a step
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad])
        tunerkit.attach(model, optimizer)
        model(input_ids=torch.tensor([[2, 3]])).logits.sum().backward()
        optimizer.step()
    perturb_(model)
    return model


@attrs.frozen(kw_only=True)
class Planted(VllmServer):
    """A server that gets another file than was published, but for the perturbed one."""

    change: Callable[[dict[str, Any], Tensors], Tensors | None]

    def load(self, name: str, folder: Path) -> None:
        if "-own-" in name:
            copied = folder.parent.parent / "planted" / name
            shutil.copytree(folder, copied)
            config = json.loads((copied / "adapter_config.json").read_text())
            tensors = load_file(copied / "adapter_model.safetensors")
            tensors = self.change(config, tensors) or tensors
            (copied / "adapter_config.json").write_text(json.dumps(config))
            save_file({each: tensors[each].contiguous() for each in tensors}, copied / "adapter_model.safetensors")
            folder = copied
        super().load(name, folder)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("lora", {"rank": 4}),
        ("lora", {"rank": 4, "rslora": True, "alpha": 16}),
        ("adalora", {"target_rank": 2, "total_steps": 100}),
    ],
)
def test_where_engine_and_model_agree_nothing_is_said(
    method: str, config: dict[str, Any], folder: Path, engine: StubVllm, tmp_path: Path
) -> None:
    """And the engine has no adapter more afterwards."""
    model = wrapped(folder, method, **config)
    found = check_rollout(model, engine.url, tokenizer=AutoTokenizer.from_pretrained(folder), folder=tmp_path)
    assert found.cause is None
    assert found.largest < 1e-4
    assert found.base < 1e-5
    assert found.ratio == pytest.approx(1, abs=1e-4)
    assert (found.greedy, found.tokens) == ((8,) * 12, 96)
    assert found.moved > 0.1
    assert (engine.adapters, [*tmp_path.iterdir()]) == ({}, [])


def without(*names: str) -> Callable[[dict[str, Any], Tensors], Tensors]:
    """Zeros for B of some modules, as if the engine had left them out."""
    return lambda config, tensors: {
        name: each * 0 if "lora_B" in name and any(part in name for part in names) else each
        for name, each in tensors.items()
    }


def twice(config: dict[str, Any], tensors: Tensors) -> None:
    config["lora_alpha"] *= 2


def turned(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """A in the other order of memory."""
    return {name: each.T.reshape(each.shape) if "lora_A" in name else each for name, each in tensors.items()}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (without("lora_B"), "the engine answers as the base does: the adapter is not loaded"),
        (twice, "the engine applies the adapter with 2 times its scale"),
        (turned, "the engine reads A of the adapter transposed"),
        (without("q_proj"), "the engine leaves out the adapter of q_proj:"),
        (without("layers.0.", "down_proj"), r"leaves out the adapter of (layers\.0, down_proj|down_proj, layers\.0)"),
        (lambda config, tensors: {name: -each for name, each in tensors.items()}, None),
        (lambda config, tensors: {n: each.roll(1, 0) for n, each in tensors.items()}, "by none of the mistakes that"),
    ],
    ids=["not loaded", "scale twice", "transposed", "a kind of layer", "a layer and a kind", "equal", "unknown"],
)
def test_a_planted_mistake_is_named(
    change: Callable[[dict[str, Any], Tensors], Tensors | None],
    cause: str | None,
    folder: Path,
    engine: StubVllm,
    tmp_path: Path,
) -> None:
    """In the matrices: of both signs, they are the same adapter."""
    found = check_rollout(wrapped(folder), Planted(url=engine.url, change=change), folder=tmp_path / "versions")
    assert (found.cause is None) == (cause is None)
    if cause is not None:
        assert re.search(cause, str(found.cause))
        assert found.mean > 1e-2


def test_an_older_version_is_named(folder: Path, engine: StubVllm, tmp_path: Path) -> None:
    """Which one, of those in the folder."""
    model = wrapped(folder)
    random_folder(tmp_path / "other-0123456789abcdef")  # of another model, which is passed over
    (tmp_path / "damaged-0123456789abcdef").mkdir()
    (tmp_path / "damaged-0123456789abcdef" / "adapter_config.json").write_text("{")
    versions = publisher(model, engine.url, folder=tmp_path)
    names = [versions.publish()]
    for _ in range(2):
        perturb_(model)
        names.append(versions.publish())
    found = check_rollout(model, engine.url, version=names[-1], folder=tmp_path)
    assert (found.version, found.cause) == (names[-1], None)
    perturb_(model)
    found = check_rollout(model, engine.url, version=names[1], folder=tmp_path)
    assert found.cause is not None
    assert found.cause.startswith(f"the engine computes with {names[1]}, another version")


def test_other_bases_dtypes_templates_and_dead_adapters(folder: Path, engine: StubVllm, tmp_path: Path) -> None:
    """Each by what differs without the adapter, or with a perturbed one."""
    model, tokenizer = wrapped(folder), AutoTokenizer.from_pretrained(folder)
    right = engine.model
    assert right is not None

    def cause(base: torch.nn.Module) -> str:
        engine.serve(base, AutoTokenizer.from_pretrained(folder))
        found = check_rollout(model, engine.url, tokenizer=tokenizer, folder=tmp_path)
        assert found.cause is not None
        return found.cause

    other = copy.deepcopy(right)
    torch.nn.init.normal_(other.get_parameter("lm_head.weight"))
    assert "the engine's base is another model" in cause(other)
    assert "computes in another dtype than the trainer, whose is float32" in cause(copy.deepcopy(right).bfloat16())
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|> ", "<|assistant|>  good")
    assert "the engine's chat template is another one, from token" in cause(right)
    engine.ignores = True
    assert "the engine answers as the base does" in cause(right)
    fresh = tunerkit.wrap(AutoModelForCausalLM.from_pretrained(folder), "lora", {"rank": 4})
    found = check_rollout(fresh, engine.url, folder=tmp_path)
    assert "does not change the engine's answers: it ignores adapters" in str(found.cause)
