"""The default targets of mixtures of experts, by transformers' ``config.model_type``."""

from tunerkit.plugin import DefaultTargets

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
# Of stacks, of shared experts and of the first, dense layers. Routers are left out.
_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_MAMBA = ("in_proj", "out_proj")

DEFAULT_TARGETS = (
    DefaultTargets(
        (
            *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss", "llama4_text", "phimoe"),
            *("ernie4_5_moe", "glm4_moe", "dots1", "minimax", "flex_olmo", "hunyuan_v1_moe"),
        ),
        (*_ATTENTION, *_EXPERTS),
    ),
    DefaultTargets(("deepseek_v2", "deepseek_v3"), (*_ATTENTION, *_LATENT, *_EXPERTS)),
    DefaultTargets(("granitemoeshared", "granitemoehybrid"), (*_ATTENTION, *_EXPERTS, "input_linear", "output_linear")),
    DefaultTargets(("nemotron_h",), (*_ATTENTION, *_MAMBA, *_EXPERTS)),
)
