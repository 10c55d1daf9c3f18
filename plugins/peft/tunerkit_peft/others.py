"""What a PEFT file holds beside the adapter's matrices: modules trained in full, biases, and tables of the base."""

from collections.abc import Mapping
from typing import Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import BaseMismatchError, FileError
from tunerkit_peft.adapter_config import Common
from tunerkit_peft.places import Rename, place_of
from tunerkit_peft.weights import PREFIX, Weights

_BASE: Final = ".base_layer"
_COPY: Final = ".modules_to_save."
_ORIGINAL: Final = ".original_module."
TABLES: Final = ("embed_tokens", "lm_head")  # PEFT saves these layers of the base whole if it adapts or resizes them


@attrs.frozen(eq=False)
class Others:
    """Tensors that are no products.

    Attributes:
        copies: The tensors of the modules trained in full, by path and name.
        biases: The trained biases, by path.
    """

    copies: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor]


def read_others(settings: Common, weights: Weights, modules: Mapping[str, nn.Module], rename: Rename) -> Others:
    """Read them, and compare the base's tables with the model.

    Raises:
        FileError: A tensor belongs to nothing.
        BaseMismatchError: A table differs from the model's.
    """
    found = Others({}, {})
    unexpected = []
    for name, key in weights.others.items():
        plain = _plain(name, weights)
        if not plain:
            continue
        owner, _, leaf = plain.rpartition(".")
        if copied := copy_around(settings, plain):
            path = rename(copied)
            found.copies.setdefault(path, {})[plain.removeprefix(copied + ".")] = weights.tensor(key)
            continue
        path = place_of(owner.removesuffix(_BASE), rename).path
        if leaf == "bias" and settings.bias != "none":
            found.biases[path] = weights.tensor(key)
        elif leaf in ("weight", "bias") and _is_table(owner, modules.get(path)):
            _compare(weights, key, path, modules.get(path), leaf)
        else:
            unexpected.append(shown(key))
    if unexpected:
        raise FileError(
            "\n- ".join(
                [
                    f"{weights.file} holds tensors that belong to nothing in {settings.file.name}. If they are "
                    "trained, their module must be in 'modules_to_save', or 'bias' must say so:",
                    *first(unexpected),
                ]
            )
        )
    return found


def _plain(name: str, weights: Weights) -> str:
    """The name of a tensor without PEFT's wrapper; empty for one that is there a second time or is not the adapter's.

    With ``bias="all"`` PEFT also saves what a copy replaces, and the copy's own biases again. It takes the adapter's
    name out of a name only at its end, so in a copy of several modules that name follows the wrapper's.
    """
    if _ORIGINAL in name:
        return ""
    around, wrapper, inside = name.partition(_COPY)
    if not wrapper:
        return name
    named = f"{around}.{inside.partition('.')[2]}"
    return "" if f"{around}.{inside}" in weights.others or named in weights.others else f"{around}.{inside}"


def copy_around(settings: Common, name: str) -> str:
    """Return the outermost module around a tensor that ``modules_to_save`` names. PEFT compares bare ends of names."""
    if not settings.copies:
        return ""
    parts = name.split(".")[:-1]
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return next((path for path in around if (PREFIX + path).endswith(settings.copies)), "")


def _is_table(owner: str, module: nn.Module | None) -> bool:
    return owner.endswith(_BASE) or isinstance(module, nn.Embedding) or owner.split(".")[-1] in TABLES


def _compare(weights: Weights, key: str, path: str, module: nn.Module | None, leaf: str) -> None:
    own = dict(module.named_parameters(recurse=False)).get(leaf) if module is not None else None
    where = f"{weights.file} holds {shown(key)}, a part of the base model,"
    trained = " If it was trained, set 'bias' to 'lora_only' or 'all' in the settings" if leaf == "bias" else ""
    if own is None:
        raise BaseMismatchError(
            f"{where} and this model has no {leaf} at {path!r}; load the base model it was made for.{trained}"
        )
    if own.shape != (shape := weights.shape(key)):
        resize = f", perhaps after model.resize_token_embeddings({shape[0]})" if path.split(".")[-1] in TABLES else ""
        raise BaseMismatchError(
            f"{where} of shape {list(shape)}, and this model has {list(own.shape)} at {path!r}; load the base model it "
            f"was made for{resize}.{trained}"
        )
    if own.is_meta:
        return
    saved = weights.tensor(key)
    narrow = own.dtype if own.dtype.itemsize < saved.dtype.itemsize else saved.dtype
    if not torch.equal(own.detach().cpu().to(narrow), saved.to(narrow)):
        raise BaseMismatchError(
            f"{where} and it differs from this model's {leaf} at {path!r}. Load the base model it was made for, or "
            f"copy that tensor into the model before you load the adapter.{trained}"
        )
