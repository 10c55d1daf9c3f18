"""What engines look for in a folder: each function returns the settings or tensors that it found."""

import re
from collections.abc import Callable, Iterator, Mapping

from tunerkit.errors import shown
from tunerkit_serving.adapter_folder import CONFIG, Folder

Finds = Callable[[Folder, int | None], list[str]]


def setting(*keys: str) -> Finds:
    """Return a sign: any of these settings is neither missing nor empty, False or 0."""

    def finds(folder: Folder, max_rank: int | None) -> list[str]:
        return [_said(folder, key) for key in keys if folder.config.get(key)]

    return finds


def _said(folder: Folder, key: str) -> str:
    return f"{CONFIG}: {key}={shown(folder.config.get(key))}"


def other_method(folder: Folder, max_rank: int | None) -> list[str]:
    """Find a method that is neither LoRA nor AdaLoRA."""
    return [] if folder.kind in ("LORA", "ADALORA") else [_said(folder, "peft_type")]


def adalora(folder: Folder, max_rank: int | None) -> list[str]:
    """Find AdaLoRA: a third factor, and names without ``.weight``."""
    return [_said(folder, "peft_type")] if folder.kind == "ADALORA" else []


def not_lora(folder: Folder, max_rank: int | None) -> list[str]:
    """Find any method but LoRA."""
    return [] if folder.is_lora else [_said(folder, "peft_type")]


def bias(folder: Folder, max_rank: int | None) -> list[str]:
    """Find trained biases."""
    named = folder.config.get("bias", "none")
    said = [_said(folder, "bias")] if named != "none" else []
    return said or [name for name in folder.others if name.endswith(".bias") and ".lora_" not in name]


def saved_modules(folder: Folder, max_rank: int | None) -> list[str]:
    """Find modules that were trained in full."""
    return [_said(folder, "modules_to_save")] if folder.config.get("modules_to_save") else []


def changed_base(folder: Folder, max_rank: int | None) -> list[str]:
    """Find a start that changes the base's weights: a plain base with these factors is another model."""
    start = folder.config.get("init_lora_weights", True)
    harmless = ("gaussian", "eva", "orthogonal", "mica", "lora_ga", "true", "false")
    plain = not isinstance(start, str) or start.lower() in harmless
    return [] if plain else [_said(folder, "init_lora_weights")]


def unequal_ranks(folder: Folder, max_rank: int | None) -> list[str]:
    """Find modules whose rank is not ``r``."""
    if not folder.is_lora:
        return []
    found = {path: pair.rank for path, pair in folder.pairs.items() if path not in folder.packed}
    return [f"{path} (rank {rank}, r={folder.r})" for path, rank in found.items() if rank != folder.r]


def packed_experts(folder: Folder, max_rank: int | None) -> list[str]:
    """Find pairs of factors into which PEFT has packed all experts."""
    return sorted(folder.packed)


def convolutions(folder: Folder, max_rank: int | None) -> list[str]:
    """Find factors with more than two dimensions."""
    return [f"{path} (A of shape {pair.a_shape})" for path, pair in folder.pairs.items() if len(pair.a_shape) > 2]


def strange_tensors(folder: Folder, max_rank: int | None) -> list[str]:
    """Find tensors that are neither factors, nor biases or modules trained in full, nor an embedding's own table."""
    known = re.compile(r"\.bias$|\.base_layer\.weight$|\.lora_E$|\.lora_magnitude_vector")
    saved = tuple(f".{name}.weight" for name in folder.config.get("modules_to_save") or ())
    return [name for name in folder.others if not known.search(name) and not (saved and name.endswith(saved))]


def base_tables(folder: Folder, max_rank: int | None) -> list[str]:
    """Find copies of the base's own tables, which PEFT saves with a targeted embedding."""
    return [name for name in folder.others if name.endswith(".base_layer.weight")]


def by_layer(folder: Folder) -> Mapping[str, Mapping[int, str]]:
    """Return the targets' paths by their path without the layer's number, and by that number.

    Targets outside numbered layers have number 0.
    """
    found: dict[str, dict[int, str]] = {}
    for path in folder.pairs:
        number = re.search(r"\.(\d+)\.", f".{path}.")
        kind = re.sub(r"\.\d+\.", ".*.", f".{path}.", count=1).strip(".")
        found.setdefault(kind, {})[int(number[1]) if number else 0] = path
    return found


def leaves(folder: Folder) -> Iterator[tuple[str, str]]:
    """Yield the parent's path and the last name of each target."""
    for path in folder.pairs:
        parent, _, leaf = path.rpartition(".")
        yield parent, leaf
