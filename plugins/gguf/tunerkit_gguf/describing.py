"""Say what a GGUF file with an adapter holds, without a model."""

import re
from pathlib import Path
from typing import Final

from tunerkit.plugin import Description
from tunerkit_gguf.container import Container
from tunerkit_gguf.reading import alpha_of, dtypes_of, names_of, open_adapter, rank_of

_HUB: Final = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")
_TOLD: Final = {
    "architecture": "general.architecture",
    "name": "general.name",
    "base_name": "general.base_model.0.name",
}


def describe(path: Path) -> Description:
    """Describe the adapter at a path from its metadata, and from the names and shapes of its tensors.

    Ranks go by llama.cpp's names of the weights, such as ``blk.0.attn_q``: the model's own need its class.

    Raises:
        FileError: The file is damaged, or holds something else than LoRA.
    """
    container = open_adapter(path)
    names, _ = names_of(container)
    values = container.values
    told = {name: values[key] for name, key in _TOLD.items() if isinstance(values.get(key), str)}
    return Description(
        "lora",
        base=_base(container),
        ranks={name.removesuffix(".weight"): rank_of(container, name) for name in names},
        settings={"alpha": alpha_of(container), "dtype": ", ".join(dtypes_of(container, names)), **told},
    )


def _base(container: Container) -> str:
    """The base's name on the hub. Its name alone is a title, from which nothing can be loaded."""
    found = _HUB.fullmatch(str(container.values.get("general.base_model.0.repo_url", "")))
    return found[1] if found else ""
