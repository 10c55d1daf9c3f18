"""Adapter files that other libraries write, and the distributions that read them."""

from collections.abc import Collection, Iterable

import attrs


@attrs.frozen
class ForeignFormat:
    """Another library's way of writing an adapter.

    Attributes:
        library: The library's name.
        files: The names of its files.
        prefixes: What the names of its tensors begin with.
        distribution: The distribution that reads it into tunerkit.
        instead: How to read it without tunerkit.
    """

    library: str
    files: tuple[str, ...]
    prefixes: tuple[str, ...]
    distribution: str
    instead: str


FOREIGN_FORMATS = (
    ForeignFormat(
        library="PEFT",
        files=("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        prefixes=("base_model.model.",),
        distribution="tunerkit-peft",
        instead="peft.PeftModel.from_pretrained",
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
        if any(file in files for file in known.files) or any(name.startswith(known.prefixes) for name in names):
            return known
    return None
