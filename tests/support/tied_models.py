"""Models whose embedding and output head share a weight: a toy, and tiny ones of transformers."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toys import Toys

HOW = ["targets", "train_modules"]
MODELS = ["toy", "llama", "gpt2", "bert", "t5"]
IDS = torch.arange(8).reshape(2, 4)
_SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}


class Toy(nn.Module):
    """An embedding, a layer and a tied head that has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10)
        self.head.weight = self.embed.weight
        self.config = SimpleNamespace(tie_word_embeddings=True)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(self.embed(ids))))
        return logits


def _tiny(kind: str, config: str = "", /, **settings: Any) -> Any:
    pytest.importorskip("tunerkit_transformers", reason="it knows how the model says that it is tied")
    transformers = importlib.import_module("transformers")
    return getattr(transformers, kind)(getattr(transformers, config or kind.partition("For")[0] + "Config")(**settings))


_BUILD: dict[str, Callable[[], Any]] = {
    "toy": Toy,
    "llama": lambda: _tiny(
        "LlamaForCausalLM", vocab_size=20, num_key_value_heads=2, tie_word_embeddings=True, **_SIZES
    ),
    "gpt2": lambda: _tiny("GPT2LMHeadModel", "GPT2Config", vocab_size=20, **_GPT2),
    # Its head holds the bias of the decoder inside it under a name of its own.
    "bert": lambda: _tiny("BertForMaskedLM", vocab_size=20, **_SIZES),
    # Four names for one weight; no forward calls the module ``shared``.
    "t5": lambda: _tiny(
        "T5ForConditionalGeneration", vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    ),
}
# The plain names of all sides of each model's tie.
SIDES: dict[str, tuple[str, ...]] = {
    "toy": ("embed", "head"),
    "llama": ("embed_tokens", "lm_head"),
    "gpt2": ("wte", "lm_head"),
    "bert": ("word_embeddings", "decoder"),
    "t5": ("shared", "embed_tokens", "lm_head"),
}
# A layer beside the tie.
BODY = {"toy": "body", "llama": "q_proj", "gpt2": "c_attn", "bert": "query", "t5": "q"}


def tied(name: str) -> Any:
    """The same model at every call, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _BUILD[name]().eval()


def settings(name: str, setting: str) -> dict[str, Any]:
    """A config that names all sides of the tie in ``setting``, and the layer beside it in ``targets``."""
    chosen: dict[str, Any] = {"targets": [BODY[name]], "exclude": ["transform"] if name == "bert" else []}
    return {**chosen, setting: [*SIDES[name], *(chosen["targets"] if setting == "targets" else [])]}


def trained(toys: "Toys", name: str, how: str = "targets", **config: object) -> Any:
    """A tied model with an adapter at all sides, whose values were changed."""
    model = tunerkit.wrap(tied(name), "toy-low-rank", {**settings(name, how), **config}, seed=3)
    return toys.fill_(model)


def logits(model: Any, *, grad: bool = False) -> Tensor:
    """The model's output for `IDS`."""
    with torch.set_grad_enabled(grad):
        found = (
            model(IDS, decoder_input_ids=IDS) if hasattr(model, "decoder") and hasattr(model, "shared") else model(IDS)
        )
    output: Tensor = found if isinstance(found, Tensor) else found.logits
    return output


def untie_(model: nn.Module) -> nn.Module:
    """Give each module that shares a parameter its own one, with the same values."""
    seen: set[int] = set()
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))
    return model


def sharing(model: nn.Module) -> dict[str, int]:
    """The identity of the base's parameters under each of their names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: id(parameter) for name, parameter in named if ".tunerkit." not in name}
