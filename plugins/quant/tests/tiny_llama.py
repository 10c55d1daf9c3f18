"""A tiny Llama, saved once, and loaded in every precision that transformers offers through bitsandbytes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN = 64


def save(folder: Path) -> Path:
    """Write the base in full precision."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, form: str = "float32", **options: Any) -> Any:
    """Load it as ``"nf4"``, ``"int8"`` or in full precision."""
    import transformers

    quantised: dict[str, dict[str, Any]] = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        "int8": {"load_in_8bit": True},
    }
    if form in quantised:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**quantised[form])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)


def rows(count: int = 16, length: int = 12) -> list[dict[str, Tensor]]:
    """Sequences that count up, each from another number."""
    sequences = [(torch.arange(length) + start) % 32 for start in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def logits(model: Any) -> Tensor:
    """The model's output for `rows`, in eval mode."""
    mode = model.training
    with torch.no_grad():
        found: Tensor = model.eval()(torch.stack([row["input_ids"] for row in rows(4)])).logits
    model.train(mode)
    return found.float()
