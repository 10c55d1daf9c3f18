"""Adapter files that other libraries write, and the distributions that read them."""

from collections.abc import Collection, Iterable

import attrs


@attrs.frozen
class ForeignFormat:
    """Another library's way of writing an adapter.

    Attributes:
        format: The format's name, see `tunerkit.export`.
        library: The library's name.
        distribution: The distribution that reads and writes it.
        files: The names of its files, or their ends.
        prefixes: What the names of its tensors begin with.
        instead: How to use it without tunerkit; empty if there is no way.
    """

    format: str
    library: str
    distribution: str
    files: tuple[str, ...]
    prefixes: tuple[str, ...] = ()
    instead: str = ""


_PART = "lora"  # of the name of a tensor, in all of these formats
DEFAULT_FORMAT = "peft"  # the one that most programs read
FOREIGN_FORMATS = (
    ForeignFormat(
        format=DEFAULT_FORMAT,
        library="PEFT",
        distribution="tunerkit-peft",
        files=("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        prefixes=("base_model.model.",),
        instead="Without it, use PEFT: peft.PeftModel.from_pretrained(model, folder)",
    ),
    ForeignFormat(
        format="diffusers",
        library="diffusers",
        distribution="tunerkit-diffusers",
        files=("pytorch_lora_weights.safetensors",),
        prefixes=("unet.", "transformer.", "text_encoder."),
        instead="Without it, use diffusers: pipeline.load_lora_weights(folder)",
    ),
    ForeignFormat(
        format="kohya",
        library="Kohya's scripts",
        distribution="tunerkit-diffusers",
        files=(),
        prefixes=("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_"),
        instead="Without it, use diffusers: pipeline.load_lora_weights(folder)",
    ),
    ForeignFormat(
        format="gguf",
        library="llama.cpp",
        distribution="tunerkit-gguf",
        files=(".gguf",),
        instead="Use it in llama.cpp",
    ),
)


def foreign_format(files: Collection[str], tensors: Iterable[str] = ()) -> ForeignFormat | None:
    """Return the format of a file or folder; None if it is not known.

    Args:
        files: The name of the file, or the names in the folder.
        tensors: The names of the tensors in the file, if they are known.
    """
    names = list(tensors)
    for known in FOREIGN_FORMATS:
        if any(file.endswith(known.files) for file in files if known.files):
            return known
        if known.prefixes and any(name.startswith(known.prefixes) and _PART in name for name in names):
            return known
    return None
