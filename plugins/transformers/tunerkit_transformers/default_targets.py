"""The default targets of each known architecture, by transformers' ``config.model_type``.

Each entry names the attention and MLP matrices of the repeated blocks: no embedding, no pooler, no output head.
For other architectures, targets are chosen by layer type. Multi-modal models have no entry, since their towers differ
too much for one tuple of names. An entry may name layers that only some versions or variants of the architecture have.
"""

from tunerkit.plugin import DefaultTargets

_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("intermediate.dense", "output.dense")
_BERT = ("query", "key", "value", *_MLP)
_ALBERT = ("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output")
_LLAMA = (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
_BART = (*_QKV, "out_proj", "fc1", "fc2")
_NEOX = ("query_key_value", "attention.dense", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h")

DEFAULT_TARGETS = (
    DefaultTargets(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"), _BERT),
    DefaultTargets(("deberta-v2",), ("query_proj", "key_proj", "value_proj", "pos_query_proj", "pos_key_proj", *_MLP)),
    DefaultTargets(("distilbert",), ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")),
    DefaultTargets(("albert",), _ALBERT),
    DefaultTargets(("mpnet",), ("attn.q", "attn.k", "attn.v", "attn.o", *_MLP)),
    DefaultTargets(("modernbert",), ("Wqkv", "Wi", "Wo")),
    DefaultTargets(("gpt2",), ("c_attn", "q_attn", "c_fc", "c_proj")),
    DefaultTargets(("gpt_neo",), (*_QKV, "out_proj", "c_fc", "c_proj")),
    DefaultTargets(("gptj",), (*_QKV, "out_proj", "fc_in", "fc_out")),
    DefaultTargets(("gpt_neox", "bloom", "falcon"), _NEOX),
    DefaultTargets(("phi",), (*_QKV, "self_attn.dense", "fc1", "fc2")),
    DefaultTargets(("phi3",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    DefaultTargets(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    DefaultTargets(("granite", "cohere", "olmo", "olmo2", "smollm3", "stablelm"), _LLAMA),
    DefaultTargets(("t5", "mt5", "umt5"), ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")),
    DefaultTargets(("bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100", "whisper", "opt"), _BART),
    DefaultTargets(("clip", "clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model"), _BART),
    # transformers renamed the matrices of these models; the second half lists the older names.
    DefaultTargets(("vit", "deit", "dinov2"), (*_QKV, "o_proj", "fc1", "fc2", *_BERT)),
    DefaultTargets(("wav2vec2", "hubert", "wavlm"), (*_QKV, "out_proj", "intermediate_dense", "output_dense")),
)
