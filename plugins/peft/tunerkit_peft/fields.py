"""What tunerkit does with each field of PEFT's LoraConfig and AdaLoraConfig (peft 0.21)."""

from collections.abc import Iterator, Mapping
from typing import Final

from tunerkit.errors import closest, shown

# Read by `settings`.
READ: Final = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "base_model_name_or_path",
        "init_lora_weights",
        "ensure_weight_tying",
        "init_r",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    }
)

# They say how the adapter was made or where it was put. The tensors say that too, by their names and shapes, so
# nothing depends on them. Of the last four, Unsloth writes the first, and ms-swift the others, of its
# own optimizer and dtype.
HARMLESS: Final = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
        "unsloth_fixed",
        "lora_dtype",
        "lorap_lr_ratio",
        "lorap_emb_lr",
    }
)

_MERGE: Final = "merge it in PEFT (merge_and_unload) and use the merged model as the base"
_RETRAIN: Final = "train a plain LoRA instead"
# The field, what it makes of the adapter, and what to do.
REFUSED: Final[Mapping[str, tuple[str, str]]] = {
    "use_dora": (
        "DoRA, which also scales the base weight",
        f"{_MERGE}, or install tunerkit[methods], whose method 'dora' is this one",
    ),
    "lora_bias": ("a bias in lora_B, which is no product of two matrices", _MERGE),
    "trainable_token_indices": ("single trained rows of an embedding", f"{_MERGE}, or train the embedding in full"),
    "layer_replication": ("a base model with repeated layers", f"{_MERGE}, or build that base model first"),
    "target_parameters": (
        "adapters of parameters such as experts, which PEFT's LoRA alone has",
        f"{_MERGE}, or leave it out",
    ),
    "alora_invocation_tokens": ("an activated LoRA, which works from certain tokens on", _RETRAIN),
    "use_qalora": ("QA-LoRA, which averages groups of the input", _RETRAIN),
    "use_bdlora": ("BD-LoRA, whose matrices are block-diagonal", _MERGE),
    "arrow_config": ("Arrow, which routes between several adapters", "load each of its adapters by itself"),
    "kasa_config": ("KaSA, which changes the base weight at the start", _MERGE),
    "monteclora_config": ("MonteCLoRA, which draws random weights in training", _MERGE),
    "megatron_config": ("an adapter of Megatron's parallel layers", _RETRAIN),
}

# Starts of A and B that leave the base weight as it is: the files say all. The other ones change it.
PLAIN_STARTS: Final = ("gaussian", "eva", "orthogonal", "mica")  # and true, false, null
CHANGED_BASE: Final = (
    "a start that changes the base weights, which are not in the files. Convert it in PEFT: save it with "
    "save_pretrained(folder, path_initial_model_for_weight_conversion=...), or use the changed model as the base"
)
RANDOM_START: Final = (
    "a start that changes the base weights by a random decomposition, which cannot be repeated: PEFT rebuilds another. "
    "Where it was trained, save it with save_pretrained(folder, path_initial_model_for_weight_conversion=...), or use "
    "the changed model as the base"
)


def problems(found: Mapping[str, object]) -> Iterator[str]:
    """Yield what the settings ask for that an adapter of tunerkit cannot do, each with what to do instead.

    Args:
        found: The settings by name, as the file has them.
    """
    for name, value in found.items():
        if name in READ or name in HARMLESS or not value:
            continue
        if name in REFUSED:
            what, instead = REFUSED[name]
            yield f"{name!r} is {shown(value)}: {what}. tunerkit cannot hold that; {instead}"
        else:
            hint = closest(name, READ | HARMLESS | REFUSED.keys())
            yield (
                f"{name!r} is {shown(value)}, a setting that PEFT 0.21 does not have{hint}. It may change what the "
                "adapter computes, so it is not ignored; delete it from the file if it does not"
            )
