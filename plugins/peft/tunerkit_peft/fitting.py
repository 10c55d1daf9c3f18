"""Refuse an adapter whose tensors do not fit the modules of a model, with what to do."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from torch import nn

from tunerkit.errors import first, shown
from tunerkit.plugin import BaseMismatchError, FileError
from tunerkit_peft.adapter_config import Common
from tunerkit_peft.others import TABLES, Others
from tunerkit_peft.parts import Parts
from tunerkit_peft.selecting import few
from tunerkit_peft.tasks import HEADS, auto_class
from tunerkit_peft.weights import Weights

_EXPERT: Final = re.compile(r"(?P<experts>(?:.+\.)?experts)\.\d+\..+")


def refuse_others(
    settings: Common,
    file: Path,
    paths: Sequence[str],
    others: Others,
    modules: Mapping[str, nn.Module],
    *,
    contradictions: Iterable[str] = (),
    mismatches: Iterable[str] = (),
) -> None:
    """Refuse what only this format can explain. Core compares all other paths and shapes.

    Args:
        settings: The settings.
        file: The file of the tensors.
        paths: The paths of the targets.
        others: The copies and the biases.
        modules: The model's modules.
        contradictions: What else does not fit, which no other base would change.
        mismatches: What else does not fit this base.

    Raises:
        FileError: Tensors contradict each other, or are of another type than their module.
        BaseMismatchError: The model has no such head, no modules for experts, or other sizes.
    """
    if wrong := [*_adapted_copies(paths, others), *contradictions]:
        raise FileError("\n- ".join([f"{file} does not fit this model:", *first(wrong)]))
    base = f", {shown(settings.base)}" if settings.base else ""
    if wrong := [*_mismatches(settings, paths, others, modules), *mismatches]:
        raise BaseMismatchError("\n- ".join([f"{file} was made for another base model{base}:", *first(wrong)]))


def _adapted_copies(paths: Sequence[str], others: Others) -> Iterator[str]:
    for path in paths:
        if copy := next((copy for copy in others.copies if path == copy or path.startswith(copy + ".")), ""):
            yield f"{path!r} is adapted, and {copy!r} is trained in full; PEFT never does both, so leave one out"


def other_kinds(parts: Sequence[Parts], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the matrices of a LoRA that belong to an embedding, or to a layer, and are at the other one."""
    for each in parts:
        name, module = each.names["A"], modules.get(each.place.path)
        if module is not None and isinstance(module, nn.Embedding) != ("lora_embedding_" in name):
            kind = "lora_embedding_A" if isinstance(module, nn.Embedding) else "lora_A"
            yield f"{name} belongs to a {type(module).__name__} here, for which PEFT writes {kind}"


def _mismatches(
    settings: Common, paths: Sequence[str], others: Others, modules: Mapping[str, nn.Module]
) -> Iterator[str]:
    heads = [path for path in (*others.copies, *paths) if path not in modules]
    heads = [path for path in heads if not set(HEADS).isdisjoint(path.split("."))]
    if heads:
        needed = auto_class(settings.selection.task, settings.selection.model_class)
        yield (
            f"it changes {few(heads)}, a head that this {type(modules.get('')).__name__} does not have; load the base "
            f"with it{f' by {needed}' if needed else ''}"
        )
    for path in paths:
        yield from _experts(path, modules)
    for path, own in others.copies.items():
        module, tensor = modules.get(path), own.get("weight")
        weight = getattr(module, "weight", None)
        is_table = isinstance(module, nn.Embedding) or path.rpartition(".")[2] in TABLES
        if tensor is None or weight is None or not is_table or tensor.ndim != 2 or len(tensor) == len(weight):
            continue
        yield (
            f"{path!r}, which is trained in full, has {len(tensor)} rows, and this model has {len(weight)}; before you "
            f"load it, call model.resize_token_embeddings({len(tensor)})"
        )


def _experts(path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Name experts that were modules in transformers 4."""
    found = _EXPERT.fullmatch(path)
    if found and path not in modules and f"{found['experts']}.0" not in modules:
        yield (
            f"{path!r} is an expert by itself, as in transformers 4; from transformers 5 on, all experts of "
            "a layer are one parameter, which tunerkit[experts] adapts: install it. Or merge the adapter with "
            "transformers 4 and PEFT (merge_and_unload), and use the merged model as the base"
        )


def other_kernels(weights: Weights, parts: Sequence[Parts], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the convolutions of a LoRA that have another kernel: two may have the same number of weights."""
    for each in parts:
        module, shape = modules.get(each.place.path), weights.shape(each.names["A"])
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and shape[1:] != tuple(module.weight.shape[1:]):
            yield (
                f"{each.names['A']} is {list(shape)}; the convolution at {each.place.path!r} needs [r, "
                f"{', '.join(map(str, module.weight.shape[1:]))}]"
            )
