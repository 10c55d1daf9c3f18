"""The models, with random weights, and their training data."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.utils.generic import ModelOutput

from benchmarks.speed.settings import BLOCK_LINEARS, Settings, Size

ATTENTION = "sdpa"
KERNEL: dict[str, Any] = {"attn_implementation": ATTENTION}  # the configs accept it without declaring it
BERT_TARGETS = ("query", "key", "value", "dense")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# hidden, intermediate, blocks, heads, key-value heads of Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B.
LLAMA_SHAPES = {
    "llama-1b": (2048, 8192, 16, 32, 8),
    "llama-8b": (4096, 14336, 32, 32, 8),
    "llama-70b": (8192, 28672, 80, 64, 8),
}


@dataclasses.dataclass
class Output(ModelOutput):
    """The loss alone, in the attribute where PEFT's AdaLoRA adds its regulariser."""

    loss: Tensor


class Regression(nn.Module):
    """A transformer whose last hidden states are trained towards a fixed target."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, target: Tensor) -> Output:
        """The loss for embedded tokens ``x`` (batch, tokens, hidden); ``target`` has the same shape."""
        hidden = self.body(inputs_embeds=x).last_hidden_state
        return Output(loss=(hidden - target).float().square().sum(-1).mean())


@attrs.frozen(eq=False)
class Workload:
    """A frozen base, the names of its adapted layers, and the one batch that every step uses.

    ``x`` represents the embeddings' output. It requires a gradient in every contender, the floor included, as after
    ``enable_input_require_grads``: gradients flow through all activations, however few parameters are trained.
    """

    name: str
    base: Regression
    targets: tuple[str, ...]
    x: Tensor
    target: Tensor
    autocast: torch.dtype | None = None

    def precision(self) -> torch.autocast:
        """The context of a forward pass: mixed precision if ``autocast`` is set."""
        return torch.autocast(self.x.device.type, self.autocast, enabled=self.autocast is not None)

    @property
    def adapted(self) -> int:
        """The number of layers that get an adapter."""
        linears = (path for path, module in self.base.named_modules() if isinstance(module, nn.Linear))
        return sum(path.endswith(tuple(f".{target}" for target in self.targets)) for path in linears)

    def model(self) -> Regression:
        """A new model that shares the frozen weights: all contenders read the same memory."""
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})

    def apart(self) -> "Workload":
        """The same workload with separate weights, for callers that change them."""
        return attrs.evolve(self, base=copy.deepcopy(self.base))


def encoders(settings: Settings) -> list[Workload]:
    """One BERT-like encoder per size. All linear layers of its blocks are adapted."""
    return [encoder(size, settings) for size in settings.sizes]


def encoder(size: Size, settings: Settings) -> Workload:
    """A BERT-like encoder without the cost of embeddings, and without pooler or dropout."""
    config = BertConfig(
        vocab_size=8,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **KERNEL,
    )
    torch.manual_seed(settings.seed)
    body = BertModel(config, add_pooling_layer=False)
    return workload(size.name, body, BERT_TARGETS, (settings.batch, settings.tokens, size.hidden), settings.seed)


def small_llama(blocks: int, settings: Settings, *, hidden: int = 32) -> Workload:
    """Llama's shapes in miniature, 7 adapted layers a block: (d, d), (d, d/4), (d, 4d) and (4d, d); no biases."""
    torch.manual_seed(settings.seed)
    body = LlamaModel(llama_config(hidden, 4 * hidden, blocks, 4, 1))
    return workload(f"{BLOCK_LINEARS * blocks} layers", body, LLAMA_TARGETS, (1, 4, hidden), settings.seed)


def large_llama(name: str, shape: Sequence[int], settings: Settings, device: str) -> Workload:
    """A Llama of a published shape in bf16, built on ``device``; adapters are fp32 and multiply in bf16, as usual."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(settings.seed)
        with torch.device(device):
            body = LlamaModel(llama_config(*shape))
            found = workload(name, body, LLAMA_TARGETS, (settings.batch, settings.tokens, shape[0]), settings.seed)
            return attrs.evolve(found, autocast=torch.bfloat16)
    finally:
        torch.set_default_dtype(before)


def hollow_llama(name: str, blocks: int) -> LlamaForCausalLM:
    """A causal Llama of a published shape with ``blocks`` blocks, whose weights take no memory and are all zero."""
    hidden, intermediate, _, heads, kv_heads = LLAMA_SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(hidden, intermediate, blocks, heads, kv_heads))
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(torch.zeros(()).expand(parameter.shape)))
    return model


def workload(name: str, body: PreTrainedModel, targets: tuple[str, ...], shape: Sequence[int], seed: int) -> Workload:
    """Freeze ``body`` and draw a batch of ``shape`` for it, on torch's default device and in its default dtype."""
    base = Regression(body).train().requires_grad_(False)
    torch.manual_seed(seed + 1)
    return Workload(name, base, targets, torch.randn(*shape), torch.randn(*shape))


def llama_config(hidden: int, intermediate: int, blocks: int, heads: int, kv_heads: int) -> LlamaConfig:
    """A Llama without embeddings that cost anything."""
    return LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
        pad_token_id=0,
        **KERNEL,
    )
