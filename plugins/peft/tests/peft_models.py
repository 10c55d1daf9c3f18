"""Tiny models for PEFT's adapters, with what can be adapted in each, and inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
import transformers as hf
from torch import Tensor, nn

Outputs = Callable[[nn.Module], Tensor]


@attrs.frozen(eq=False)
class Case:
    """A model that can be built again and again.

    Attributes:
        build: Builds it, with the same weights each time.
        inputs: Its inputs by name, or by position.
        names: Names of modules to adapt.
        heads: Names of modules to train in full.
        linear: The names that PEFT's AdaLoRA adapts too.
        biases: PEFT's settings of ``bias`` that tunerkit holds for this model.
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor] | tuple[Tensor, ...]
    names: tuple[str, ...]
    heads: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    biases: tuple[str, ...] = ("none", "lora_only", "all")

    def output(self, model: nn.Module) -> Tensor:
        """Run the model."""
        found: Any = model(**self.inputs) if isinstance(self.inputs, Mapping) else model(*self.inputs)
        found = found.logits if hasattr(found, "logits") else found
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build().eval()
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norms start at constants
                    parameter.data.add_(0.1 * torch.randn(parameter.shape))
        return model

    return built


def _llama(*, tied: bool = False) -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            attention_bias=True,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    )


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, pad_token_id=0
    )
    return hf.GPT2ForSequenceClassification(config)


def _bert() -> nn.Module:
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.3,
        )
    )


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            decoder_start_token_id=0,  # type: ignore[call-arg]
        )
    )


def _gemma3() -> nn.Module:
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.3,
            tie_word_embeddings=False,
            pad_token_id=0,
        )
    )


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            initializer_range=0.3,
        )
    )


class Attending(nn.Module):
    """Attention of torch's own between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        result: Tensor = self.last(self.attention(h, h, h)[0])
        return result


class Convolving(nn.Module):
    """Convolutions in one, two and three dimensions, with strides and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3, padding=1)
        self.two = nn.Conv2d(1, 4, (3, 2), stride=(1, 2), padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.three = nn.Conv3d(1, 4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:  # (N, 2, 8)
        one = torch.tanh(self.one(x)).mean(-1)
        two = torch.tanh(self.point(torch.tanh(self.two(x.unsqueeze(1))))).mean((-1, -2))
        three = torch.tanh(self.three(x.reshape(len(x), 1, 2, 2, 4))).mean((-1, -2, -3))
        result: Tensor = self.head(one + two + three)
        return result


_IDS = torch.tensor([[5, 3, 9, 1, 7], [2, 8, 8, 4, 6]])
_TOKENS = {"input_ids": _IDS}

# A model whose head is its embedding.
TIED = Case(_seeded(lambda: _llama(tied=True)), _TOKENS, ("q_proj", "v_proj"))
CASES: dict[str, Case] = {
    "llama": Case(
        _seeded(_llama),
        _TOKENS,
        ("q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"),
        heads=("lm_head",),
        linear=("q_proj", "v_proj", "o_proj", "down_proj", "lm_head"),
    ),
    "gpt2": Case(
        _seeded(_gpt2),
        _TOKENS,
        ("c_attn", "c_fc", "c_proj", "wte"),
        heads=("score",),
        linear=("c_attn", "c_fc", "c_proj"),
    ),
    "bert": Case(
        _seeded(_bert),
        _TOKENS,
        ("query", "value", "dense", "word_embeddings"),
        heads=("classifier",),
        linear=("query", "value", "dense"),
    ),
    "t5": Case(
        _seeded(_t5), {**_TOKENS, "decoder_input_ids": _IDS[:, :3]}, ("q", "v", "wi", "wo"), linear=("q", "v", "wi")
    ),
    "gemma3": Case(
        _seeded(_gemma3),
        _TOKENS,
        ("q_proj", "k_proj", "gate_proj", "embed_tokens"),
        heads=("lm_head",),
        linear=("q_proj", "k_proj", "gate_proj"),
    ),
    "vit": Case(
        _seeded(_vit),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)},
        ("q_proj", "v_proj", "o_proj", "projection"),
        heads=("classifier",),
        linear=("q_proj", "v_proj", "o_proj"),
    ),
    "attention": Case(
        _seeded(Attending),
        (torch.linspace(-1, 1, 60).reshape(2, 5, 6),),
        ("attention", "first"),
        heads=("last",),
        linear=("first",),
        biases=("none", "lora_only"),
    ),
    "convolutions": Case(
        _seeded(Convolving),
        (torch.linspace(-1, 1, 48).reshape(3, 2, 8),),
        ("one", "two", "point", "three"),
        heads=("head",),
        linear=("two", "point"),
    ),
}
