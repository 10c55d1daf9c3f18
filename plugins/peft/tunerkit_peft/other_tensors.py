"""What a PEFT file holds beside the adapter's matrices: modules trained in full, biases, rows of tokens, and tables."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import BaseMismatchError, Factors, FileError
from tunerkit_peft.lora_reading import NeedsWeightsError
from tunerkit_peft.paths import Rename, place_of, tied_to_input
from tunerkit_peft.settings import Common, Settings
from tunerkit_peft.tensors import PREFIX, Weights

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


_ROWS: Final = ".token_adapter.trainable_tokens_delta"


def split_rows(settings: Settings, weights: Weights) -> tuple[dict[str, str], Weights]:
    """Return the names of the tensors with rows, by the path in the file of their module, and the weights without."""
    if not settings.tokens:
        return {}, weights
    rows = {name.removesuffix(_ROWS): key for name, key in weights.others.items() if name.endswith(_ROWS)}
    rest = {name: key for name, key in weights.others.items() if not name.endswith(_ROWS)}
    return rows, attrs.evolve(weights, others=rest)


def read_rows(
    settings: Settings, weights: Weights, keys: Mapping[str, str], modules: Mapping[str, nn.Module], rename: Rename
) -> dict[str, Factors]:
    """Return what is added at each module that has such rows, also by its tie to the input's embedding.

    Args:
        settings: The adapter's settings.
        weights: Its tensors.
        keys: The names of the tensors with rows, by path in the file.
        modules: The model's modules.
        rename: Gives a module's path in the model.

    Raises:
        FileError: Rows are missing, or do not fit the settings or the model.
        NeedsWeightsError: The base has no values.
    """
    given = {rename(path): (key, _ids(settings, path)) for path, key in keys.items()}
    # Where rows of the input's embedding are trained, PEFT has them at what is tied to it too, and saves them once.
    embedding, *tied = tied_to_input(modules) or [""]
    held = tied if embedding in given and given.keys().isdisjoint(tied) else []
    problems = [
        f"{shown(name) if name else 'the embedding of the input'} has no rows in the file"
        for name, ids in settings.tokens.items()
        if not any(path.endswith(name) for path in keys)
        if not any(side.endswith(name) and ids == given[embedding][1] for side in held)
    ]
    for path, (key, ids) in given.items():
        problems += _problems(weights, key, ids, modules.get(path))
    if problems:
        title = f"{weights.file} and 'trainable_token_indices' in {settings.common.file.name} do not fit this model:"
        raise FileError("\n- ".join([title, *first(problems)]))
    return {
        each: _product(weights.tensor(key), ids, modules[each])
        for path, (key, ids) in given.items()
        for each in (path, *(held if path == embedding else ()))
    }


def _ids(settings: Settings, path: str) -> tuple[int, ...]:
    return next((ids for name, ids in settings.tokens.items() if path.endswith(name)), ())


def _problems(weights: Weights, key: str, ids: tuple[int, ...], module: nn.Module | None) -> Iterator[str]:
    weight: Any = getattr(module, "weight", None)
    shape = weights.shape(key)
    if not isinstance(module, nn.Embedding | nn.Linear) or not isinstance(weight, Tensor):
        what = "nothing" if module is None else f"a {type(module).__name__}"
        yield f"{shown(key)} belongs to {what} here, and only embeddings and linear layers have rows of tokens"
    elif len(set(ids)) != len(ids) or shape != (len(ids), weight.shape[1]) or max(ids) >= len(weight):
        yield (
            f"{shown(key)} is {list(shape)}, for {len(set(ids))} tokens up to {max(ids, default=0)} in a table of "
            f"{list(weight.shape)}"
        )


def _product(rows: Tensor, ids: tuple[int, ...], module: nn.Module) -> Factors:
    held: Any = module.weight
    if held.is_meta:
        raise NeedsWeightsError(
            "'trainable_token_indices' replace rows of the base, which has no values here; load it with its weights"
        )
    weight: Tensor = held.detach()[list(ids)].cpu()
    change = rows.to(weight.dtype).float() - weight.float()  # PEFT puts them into the base's weight, in its dtype
    chosen = torch.zeros(len(ids), len(held)).scatter_(1, torch.tensor(ids).unsqueeze(1), 1.0)
    return Factors(q=chosen, p=change.T) if isinstance(module, nn.Embedding) else Factors(q=change, p=chosen.T)
