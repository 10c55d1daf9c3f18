"""The default targets of each known architecture, by transformers' ``config.model_type``.

Each entry names the attention and MLP matrices of the repeated blocks: no embedding, no pooler, no output head.
An architecture that is not here is served by what its blocks are made of (see `tunerkit.targets.select`); so are
multi-modal models, whose towers differ too much for one tuple of names. An entry may name layers that only some
versions or variants of the architecture have.
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

_QKV = ("q_proj", "k_proj", "v_proj")
_BERT = ("query", "key", "value", "intermediate.dense", "output.dense")
_LLAMA = (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
_BART = (*_QKV, "out_proj", "fc1", "fc2")
_T5 = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
_NEOX = ("query_key_value", "attention.dense", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h")
# transformers has renamed the matrices of some vision models: the second half is the older names.
_VIT = (*_QKV, "o_proj", "fc1", "fc2", *_BERT)
_FAMILIES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"): _BERT,
    ("deberta-v2",): (
        *("query_proj", "key_proj", "value_proj", "pos_query_proj", "pos_key_proj"),
        *("intermediate.dense", "output.dense"),
    ),
    ("distilbert",): ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    ("albert",): ("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output"),
    ("mpnet",): ("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"),
    ("modernbert",): ("Wqkv", "Wi", "Wo"),
    ("gpt2",): ("c_attn", "q_attn", "c_fc", "c_proj"),
    ("gpt_neo",): (*_QKV, "out_proj", "c_fc", "c_proj"),
    ("gptj",): (*_QKV, "out_proj", "fc_in", "fc_out"),
    ("gpt_neox", "bloom", "falcon"): _NEOX,
    ("opt",): _BART,
    ("phi",): (*_QKV, "self_attn.dense", "fc1", "fc2"),
    ("phi3",): ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"): _LLAMA,
    ("granite", "cohere", "olmo", "olmo2", "smollm3", "stablelm"): _LLAMA,
    ("t5", "mt5", "umt5"): _T5,
    ("bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100", "whisper"): _BART,
    ("clip", "clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model"): _BART,
    ("vit", "deit", "dinov2"): _VIT,
    ("wav2vec2", "hubert", "wavlm"): (*_QKV, "out_proj", "intermediate_dense", "output_dense"),
}
DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {model_type: names for model_types, names in _FAMILIES.items() for model_type in model_types}
)


def default_names(model: nn.Module) -> tuple[str, ...]:
    """The default targets of ``model`` as plain names; none if its architecture is not known."""
    match model:
        case nn.Module(config=object(model_type=str(model_type))):
            return DEFAULT_TARGETS.get(model_type, ())
    return ()
