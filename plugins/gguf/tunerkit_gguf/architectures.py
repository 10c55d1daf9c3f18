"""How llama.cpp names the weights of an architecture, and orders their rows.

Each entry follows llama.cpp's converter: ``conversion/llama.py`` permutes the rows of q and k, ``conversion/qwen.py``
does not. An architecture that is not listed may rename, split, scale or transpose its weights, so it is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import FileError

INSTEAD: Final = (
    "Call tunerkit.unwrap(model, keep_merged=True), save the whole model with its save_pretrained, and convert that "
    "folder with llama.cpp's convert_hf_to_gguf.py"
)
EMBEDDING: Final = "token_embd.weight"
OUTPUT: Final = "output.weight"
_LINEAR: Final = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@attrs.frozen
class Conversion:
    """What llama.cpp's converter does with the models of one ``config.model_type``."""

    architecture: str
    permutes: bool


# A Mistral model from the hub is a Llama to llama.cpp.
_CONVERSIONS: Final[Mapping[str, Conversion]] = {
    "llama": Conversion("llama", permutes=True),
    "mistral": Conversion("llama", permutes=True),
    "qwen2": Conversion("qwen2", permutes=False),
    "qwen3": Conversion("qwen3", permutes=False),
}


@attrs.frozen(eq=False)
class Layout:
    """How llama.cpp holds one model.

    Attributes:
        architecture: The value of ``general.architecture``.
        tied: Whether the output head is the embedding, so that llama.cpp's model has no ``output.weight``.
        name_of: Returns the name of the weight of the module at a path, or None if llama.cpp adapts no such weight.
        heads: The number of attention heads whose rows are permuted, by the kind of weight: ``"attn_q"``, ``"attn_k"``.
    """

    architecture: str
    tied: bool
    name_of: Callable[[str], str | None]
    heads: Mapping[str, int]

    def heads_of(self, name: str) -> int | None:
        """Return the number of heads whose rows llama.cpp permutes in the weight ``name``; None if it keeps them."""
        return self.heads.get(name.removesuffix(".weight").rpartition(".")[2])


def layout_of(model: nn.Module) -> Layout:
    """Return how llama.cpp holds ``model``, which may be on the meta device.

    Raises:
        FileError: This architecture is not supported.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    conversion = _CONVERSIONS.get(str(model_type))
    if conversion is None:
        raise FileError(
            f"format 'gguf' supports the architectures {', '.join(_CONVERSIONS)}, and this {type(model).__name__} has "
            f"model_type {shown(model_type)}: how llama.cpp names and orders its weights is not known here. {INSTEAD}"
        )
    return Layout(
        architecture=conversion.architecture,
        tied=_is_tied(model, config),
        name_of=_names_of(conversion.architecture, config.num_hidden_layers),
        heads={"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if conversion.permutes
        else {},
    )


def _is_tied(model: nn.Module, config: object) -> bool:
    embedding, head = (
        getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")
    )
    same = embedding is not None and head is not None and embedding.weight is head.weight
    return same or bool(getattr(config, "tie_word_embeddings", False))


def _names_of(architecture: str, blocks: int) -> Callable[[str], str | None]:
    import gguf

    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], blocks)

    def name_of(path: str) -> str | None:
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name in (EMBEDDING, OUTPUT) or (name is not None and name.split(".")[-2] in _LINEAR):
            return name
        return None

    return name_of
