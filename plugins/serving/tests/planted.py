"""Adapters for a small base, and servers that get another file than was published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tunerkit
from plugins.serving.tests.stub_vllm import perturb_
from tunerkit_serving import VllmServer

Tensors = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any], Tensors], Tensors | None]


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

    change: Change

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


def without(*names: str) -> Change:
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


# What is done to the file, and the cause that a check must name. In matrices of both signs it is the same adapter.
PLANTED: dict[str, tuple[Change, str | None]] = {
    "not loaded": (without("lora_B"), "the engine answers as the base does: the adapter is not loaded"),
    "scale twice": (twice, "the engine applies the adapter with 2 times its scale"),
    "transposed": (turned, "the engine reads A of the adapter transposed"),
    "a kind of layer": (without("q_proj"), "the engine leaves out the adapter of q_proj:"),
    "a layer and a kind": (
        without("layers.0.", "down_proj"),
        r"leaves out the adapter of (layers\.0, down_proj|down_proj, layers\.0)",
    ),
    "equal": (lambda config, tensors: {name: -each for name, each in tensors.items()}, None),
    "unknown": (
        lambda config, tensors: {name: each.roll(1, 0) for name, each in tensors.items()},
        "by none of the mistakes that",
    ),
}
