"""Names that other commands have for keys of a recipe: PEFT's and TRL's scripts, axolotl, LLaMA-Factory, unsloth."""

from collections.abc import Iterable, Mapping
from typing import Final

from tunerkit.errors import closest
from tunerkit_cli.recipes.trainer_arguments import argument_types

_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "model": ("model_name_or_path", "model_name", "base_model", "model_id", "pretrained_model_name_or_path"),
    "data": ("dataset", "datasets", "dataset_name", "dataset_path", "train_data", "train_dataset", "train_file"),
    "eval_data": ("eval_dataset", "test_datasets", "val_data", "validation_file"),
    "out": ("output_dir",),
    "from_adapter": ("adapter_name_or_path", "lora_model_dir", "resume_adapter"),
    "method": ("adapter", "finetuning_type", "peft_method", "peft_type"),
    "max_length": ("block_size", "cutoff_len", "max_seq_len", "max_seq_length", "sequence_len"),
    "dtype": ("torch_dtype",),
    "quantisation=nf4": ("load_in_4bit", "qlora", "use_4bit"),
    "quantisation=int8": ("load_in_8bit", "use_8bit"),
    "attn_implementation": ("attention", "attn_impl", "flash_attention", "flash_attn", "use_flash_attention"),
    "train_on_prompts": ("train_on_inputs", "train_on_prompt", "train_on_source"),
    "early_stopping_patience": ("early_stopping", "patience"),
    "config.rank": ("lora_r", "lora_rank", "r", "rank"),
    "config.alpha": ("alpha", "lora_alpha"),
    "config.dropout": ("lora_dropout",),
    "config.targets": ("lora_modules", "lora_target", "lora_target_modules", "target_modules", "targets"),
    "config.train_modules": ("additional_target", "modules_to_save"),
    "training.learning_rate": ("lr",),
    "training.num_train_epochs": ("epochs", "n_epochs", "num_epochs"),
    "training.per_device_train_batch_size": ("batch_size", "micro_batch_size", "train_batch_size"),
    "training.gradient_accumulation_steps": ("grad_accum_steps", "gradient_accumulation"),
    "training.lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "training.warmup_steps": ("warmup", "warmup_ratio"),
}


def key_for(name: str, known: Iterable[str] = ()) -> str | None:
    """The key that another command calls so, as ``--set`` takes it; None if none is, or a ``known`` name is close."""
    named = next((key for key, others in _KEYS.items() if name in others), None)
    if named is not None or closest(name, known):
        return named
    return f"training.{name}" if name in argument_types() else None
