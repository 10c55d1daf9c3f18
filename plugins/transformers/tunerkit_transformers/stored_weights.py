"""Compare samples of a transformers model's weights with its checkpoint's."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

_CORNER = 8  # of each dimension: 64 values of a matrix
# Options of `from_pretrained` that change neither which weights are loaded nor their values, and where to find them.
_HARMLESS = frozenset({"attn_implementation", "device_map", "dtype", "torch_dtype", "trust_remote_code", "use_cache"})
_PLACES = frozenset({"cache_dir", "revision", "token"})


def differs_from_stored(model: PreTrainedModel, loaded: torch.dtype, options: Mapping[str, Any]) -> bool:
    """Whether a sampled value of ``model`` differs from its checkpoint's. Nothing is downloaded.

    False also without a local safetensors file, or if the options may change the values. Only vectors and matrices
    with the same name and shape in both are compared, since loading may rename, merge, split or transpose others.

    Args:
        model: A model with a ``name_or_path``.
        loaded: The dtype in which the checkpoint would be loaded; the model's parameters may have another dtype.
        options: Further arguments with which ``from_pretrained`` would load the checkpoint.
    """
    if not set(options) <= _HARMLESS | _PLACES:
        return False
    own = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta}
    places = {name: value for name, value in options.items() if name in _PLACES}
    try:
        files = _files(str(model.name_or_path), places)
        return any(not _is_equal(own[name], corner, loaded) for name, corner in _corners(files, own))
    except (OSError, ValueError, SafetensorError):
        return False


def _files(name: str, places: Mapping[str, Any]) -> list[Path]:
    """Return the local safetensors files of a checkpoint. Raises `OSError` if there are none."""
    try:
        return [_local(name, SAFE_WEIGHTS_NAME, places)]
    except OSError:
        index = json.loads(_local(name, SAFE_WEIGHTS_INDEX_NAME, places).read_bytes())
        return [_local(name, file, places) for file in sorted(set(index["weight_map"].values()))]


def _local(name: str, file: str, places: Mapping[str, Any]) -> Path:
    found = cached_file(name, file, local_files_only=True, **places)
    if found is None:
        raise FileNotFoundError(file)
    return Path(found)


def _corners(files: Iterable[Path], own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, first values) of each stored vector and matrix with the name and shape of a tensor in ``own``."""
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in own.keys() & stored.keys():
                part = stored.get_slice(name)
                if own[name].ndim in (1, 2) and own[name].shape == torch.Size(part.get_shape()):
                    yield name, part[_corner(own[name])]


def _corner(tensor: Tensor) -> tuple[slice, ...]:
    return tuple(slice(_CORNER) for _ in tensor.shape)


def _is_equal(tensor: Tensor, corner: Tensor, loaded: torch.dtype) -> bool:
    here = tensor[_corner(tensor)].cpu()
    return any(torch.equal(here, stored.to(here.dtype)) for stored in (corner, corner.to(loaded)))
