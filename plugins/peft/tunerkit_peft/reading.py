"""Read a PEFT adapter: settings and tensors together, as tunerkit's own record."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import FileError, Foreign
from tunerkit_peft import files
from tunerkit_peft.adapter_config import Settings, read_settings
from tunerkit_peft.completeness import missing
from tunerkit_peft.fitting import refuse_others
from tunerkit_peft.from_adalora import read_adalora
from tunerkit_peft.from_lora import read_lora
from tunerkit_peft.moving import moving
from tunerkit_peft.others import Others, read_others
from tunerkit_peft.parts import Parts, parts_of
from tunerkit_peft.places import modules_of, refuse_convolutions
from tunerkit_peft.weights import Weights, open_weights


def read(path: Path, model: nn.Module) -> Foreign:
    """Read a LoRA or AdaLoRA that PEFT saved.

    Args:
        path: The folder, one of its two files, or a name on the hub.
        model: The base model. Only names, types and shapes are used, and the values of embeddings if they are there.

    Returns:
        The adapter, as LoRA or AdaLoRA, with the scale and the settings of its training.

    Raises:
        FileError: The files are damaged, or hold what tunerkit cannot.
        BaseMismatchError: They were made for another base model.
    """
    found = files.find(path)
    settings = read_settings(found.config)
    weights = open_weights(found.weights)
    modules = modules_of(model)
    moved = moving(weights.factors, modules, getattr(model, "base_model_prefix", ""))
    parts = parts_of(settings, weights, moved.rename)
    refuse_convolutions(weights.file, modules, [each.place.path for each in parts], lora=settings.kind == "LORA")
    others = read_others(settings, weights, modules, moved.rename)
    refuse_others(settings, weights, parts, others, modules)
    _refuse_tying(settings, parts, others, modules)
    own = read_lora(settings, weights, parts) if settings.kind == "LORA" else read_adalora(settings, weights, parts)
    unknown = missing(settings, weights, modules, parts, others, is_moved=bool(moved.remarks))
    return Foreign(
        own.factors,
        settings.kind.lower(),
        config=own.config,
        tensors=own.tensors,
        copies=others.copies,
        biases=others.biases,
        base=settings.base,
        remarks=(
            *settings.remarks,
            *moved.remarks,
            *unknown,
            *_other_base(settings, model),
            *_padding(weights, parts, modules),
        ),
    )


def _refuse_tying(settings: Settings, parts: Sequence[Parts], others: Others, modules: Mapping[str, nn.Module]) -> None:
    """Refuse adapters that PEFT adds on both sides of a tied weight, while the file holds one side."""
    paths = [*(each.place.path for each in parts), *others.copies]
    embeddings = [path for path in paths if isinstance(modules.get(path), nn.Embedding)]
    if settings.tied and embeddings:
        raise FileError(
            f"{settings.file}: 'ensure_weight_tying' is true, so PEFT changes the output head together with "
            f"{embeddings[0]!r}. tunerkit adapts them one by one; merge the adapter in PEFT (merge_and_unload), and "
            "use the merged model as the base"
        )


def _other_base(settings: Settings, model: nn.Module) -> Iterator[str]:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not (isinstance(name, str) and name and settings.base):
        return
    # A folder is often a copy of the repository, so only the last part says something.
    if PurePosixPath(name).name != PurePosixPath(settings.base).name:
        yield (
            f"it was made for the base model {shown(settings.base)}, and this one is {shown(name)}; names and shapes "
            "fit, but if the weights differ, so does the result"
        )


def _padding(weights: Weights, parts: Sequence[Parts], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for each in parts:
        module = modules.get(each.place.path)
        index = module.padding_idx if isinstance(module, nn.Embedding) else None
        if index is None or weights.shape(each.names["A"])[1] <= index:
            continue
        added = weights.matrix(each.names["B"]) @ weights.matrix(each.names["A"])[:, index]
        if torch.count_nonzero(added):
            yield f"it changes the row of the padding token of {each.place.path!r}, which tunerkit leaves as it is"
