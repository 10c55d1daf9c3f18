"""The rows of single tokens that PEFT trains beside a LoRA, as products: each row of the embedding takes one rank."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import Factors, FileError
from tunerkit_peft.adapter_config import Settings
from tunerkit_peft.base_starts import NeedsWeightsError
from tunerkit_peft.places import Rename, tied_to_input
from tunerkit_peft.weights import Weights

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
