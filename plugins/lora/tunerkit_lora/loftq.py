"""LoftQ: A and B start at the quantization error, so that base and adapter are closer to the original weights."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunerkit.plugin import BaseLayer, FileError, TargetError

_INDEX: Final = "model.safetensors.index.json"


def lost(path: str, base: BaseLayer, original: str | None) -> Tensor:
    """Return the quantization error W − Q, (out, in) in fp32: the original weight minus the quantized one.

    The best rank-r approximation of the error is LoftQ's initial ΔW (Li et al., arXiv 2310.08659, Eq. 6, with one
    alternation). The paper then quantizes again, which is left out here, since it would change the base.

    Args:
        path: The target's path, by which the original's tensor is found.
        base: The quantized layer.
        original: A folder with safetensors files, or one file.

    Raises:
        TargetError: The base is not quantized, or ``original`` is None.
        FileError: The original cannot be read, or its tensor is not the layer's weight.
    """
    if base.packing is None:
        raise TargetError(
            "start 'loftq' compensates for quantization errors, and this weight is not quantized; quantize the base, "
            "or use another start, such as 'pissa'"
        )
    if original is None:
        raise TargetError(
            f"start 'loftq' needs the original of this {base.packing.name} weight; set original to the folder of the "
            "unquantized base's safetensors files"
        )
    stored = base.dense().float()
    found = _weight(f"{path}.weight" if path else "weight", Path(original)).to(stored)
    # A linear layer of GPT-2 has the transposed weight in its files.
    fitting = [each - stored for each in (found, found.T) if each.shape == stored.shape]
    nearest = min(fitting, key=lambda each: float(each.norm()), default=None)
    if nearest is None or nearest.norm() >= stored.norm():
        raise FileError(
            f"{original} has another weight for {path!r} than the base: they differ by more than a quantization error; "
            "name the folder of the unquantized base"
        )
    return nearest


def _weight(name: str, original: Path) -> Tensor:
    """Read one tensor, whose name in the file may have fewer or more leading parts, as without or with a head."""
    try:
        files = list(_files(original))
        holding = {key: file for file in files for key in _keys(file) if _same(key, name)}
    except (OSError, ValueError, SafetensorError) as error:
        raise FileError(f"{original} cannot be read: {error}. Name a folder with safetensors files") from error
    if name in holding:
        holding = {name: holding[name]}
    if len(holding) != 1:
        count = "no tensor" if not holding else f"{len(holding)} tensors"
        raise FileError(f"{original} has {count} for {name!r}; name the folder of the unquantized base")
    ((key, file),) = holding.items()
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor if tensor.ndim == 2 else tensor.flatten(1)


def _files(original: Path) -> Iterator[str]:
    if original.is_file():
        yield os.fspath(original)
    elif (index := original / _INDEX).is_file():
        held = json.loads(index.read_text(encoding="utf-8"))
        places = held.get("weight_map") if isinstance(held, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise FileError(f"{index} names no file for each tensor in 'weight_map'; save the base again")
        names = set(places.values())
        yield from (os.fspath(original / Path(name).name) for name in sorted(names))
    else:
        found = sorted(original.glob("*.safetensors"))
        if not found:
            raise FileError(f"{original} has no safetensors file; name the folder of the unquantized base")
        yield from map(os.fspath, found)


def _keys(file: str) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _same(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}") or name.endswith(f".{key}")
