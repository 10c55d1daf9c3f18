"""Read a GGUF file with a LoRA adapter."""

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import BaseMismatchError, Factors, FileError, Foreign, exact_patterns
from tunerkit_gguf.architectures import EMBEDDING, Layout, layout_of
from tunerkit_gguf.container import MAGIC, Container, open_container
from tunerkit_gguf.tensors import Pair, unpermute
from tunerkit_gguf.writing import FILE

_HALVES: Final = (".lora_a", ".lora_b")
# The entry general.type = "adapter": a key, the type of a string, and its length.
_IS_ADAPTER: Final = b"general.type" + struct.pack("<IQ", 8, 7) + b"adapter"
_BEGINNING: Final = 1 << 20  # bytes: an adapter's metadata are small


def sniff(path: Path) -> bool:
    """Whether a path is a GGUF file with an adapter, or a folder with one named adapter.gguf."""
    try:
        if not (place := _place(path)).is_file():  # to open a pipe would wait for who writes into it
            return False
        with place.open("rb") as stream:
            beginning = stream.read(_BEGINNING)
    except (OSError, ValueError):
        return False
    return beginning.startswith(MAGIC) and _IS_ADAPTER in beginning


def read(path: Path, model: nn.Module) -> Foreign:
    """Read the adapter at a path as LoRA, with the scale that llama.cpp gives it.

    Args:
        path: The file, or the folder with ``adapter.gguf``.
        model: The base model; it may be on the meta device.

    Raises:
        BaseMismatchError: The adapter is one of another model.
        FileError: The file is damaged or holds something else than LoRA, or the model's architecture is not supported.
    """
    layout = layout_of(model)
    container = open_adapter(path)
    if (found := container.values.get("general.architecture")) != layout.architecture:
        raise BaseMismatchError(
            f"{container.path} was made for another base model: general.architecture is {shown(found)}, and this model "
            f"is a {layout.architecture!r} in llama.cpp"
        )
    names, ignored = names_of(container)
    places = {name: at for at, _ in model.named_modules(remove_duplicate=False) if (name := layout.name_of(at))}
    if unknown := sorted(set(names) - set(places)):
        raise BaseMismatchError(
            f"{container.path} was made for another base model: this {type(model).__name__} has no {shown(unknown[0])}"
        )
    pairs = {places[name]: _pair(container, name, layout) for name in names}
    alpha = alpha_of(container)
    return Foreign(
        {at: _factors(pair, alpha) for at, pair in pairs.items()},
        config=_config({at: pair.rank for at, pair in pairs.items()}, alpha),
        tensors={at: {"a": pair.a, "b": pair.b} for at, pair in pairs.items()},
        base=str(container.values.get("general.base_model.0.name", "")),
        remarks=ignored,
    )


def _place(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def open_adapter(path: Path) -> Container:
    """Open the adapter at a path. Raises `FileError` if it is damaged, or no LoRA."""
    container = open_container(_place(path))
    values, path = container.values, container.path
    if (kind := values.get("general.type")) != "adapter":
        raise FileError(
            f"{path}: general.type is {shown(kind)}, not 'adapter': a whole model cannot be loaded as an adapter"
        )
    if (kind := values.get("adapter.type")) != "lora":
        raise FileError(f"{path}: adapter.type is {shown(kind)}; only 'lora' can be read")
    if "adapter.alora.invocation_tokens" in values:
        raise FileError(
            f"{path} has adapter.alora.invocation_tokens: it is applied only after certain tokens, which tunerkit "
            "cannot do. Load it in llama.cpp"
        )
    return container


def names_of(container: Container) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the adapted weights, and a remark on what the file has beside them.

    Raises:
        FileError: There are none, half of a pair is missing, or a tensor is unknown.
    """
    held = set(container.tensors)
    norms = sorted(name for name in held if name.endswith("_norm.weight"))
    names = sorted({name[: -len(half)] for name in held for half in _HALVES if name.endswith(half)})
    expected = {name + half for name in names for half in _HALVES}
    if lacking := sorted(expected - held):
        raise FileError(f"{container.path} lacks {lacking[0]}, the other half of a pair; write it again")
    if others := sorted(held - expected - set(norms)):
        raise FileError(
            f"{container.path} has the tensor {shown(others[0])}; only .lora_a and .lora_b of weights can be read"
        )
    if not names:
        raise FileError(f"{container.path} has no tensors, so there is nothing to load")
    return names, (f"{len(norms)} norms are left out, as in llama.cpp, from {norms[0]} on",) if norms else ()


def rank_of(container: Container, name: str) -> int:
    """Return the rank of the pair of a weight. Raises `FileError` if their shapes do not fit together."""
    a, b = (container.tensors[name + half].shape for half in _HALVES)
    if name == EMBEDDING:  # llama.cpp looks up its rows
        a = a[::-1]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise FileError(
            f"{container.path}: {name} has lora_a {a} and lora_b {b}, which are no (r, in) and (out, r); the file is "
            "damaged"
        )
    return b[1]


def dtypes_of(container: Container, names: Iterable[str]) -> list[str]:
    """Return how the numbers of the pairs are stored. Raises `FileError` if a tensor is cut off or of unknown type."""
    return sorted({container.dtype(name + half) for name in names for half in _HALVES})


def _pair(container: Container, name: str, layout: Layout) -> Pair:
    rank_of(container, name)  # it refuses shapes that do not fit together
    a, b = (container.tensor(name + half) for half in _HALVES)
    if name == EMBEDDING:
        a = a.T.contiguous()
    heads = layout.heads_of(name)
    if heads is not None and b.shape[0] % (2 * heads):
        raise BaseMismatchError(
            f"{container.path} was made for another base model: {name}.lora_b has {b.shape[0]} rows, and this model "
            f"has {heads} heads"
        )
    return Pair(a, b if heads is None else unpermute(b, heads))


def alpha_of(container: Container) -> float:
    """Return alpha; 0 stands for no scale. Raises `FileError` if it is no such number."""
    alpha = container.values.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha < 0:
        raise FileError(
            f"{container.path}: adapter.lora.alpha is {shown(alpha)}; it must be a positive number, or 0 for no scale"
        )
    return float(alpha)


def _factors(pair: Pair, alpha: float) -> Factors:
    # llama.cpp takes an alpha of 0 as none: the product is not scaled.
    return Factors(q=pair.a, p=pair.b * (alpha / pair.rank if alpha and pair.rank else 1.0))


def _config(ranks: Mapping[str, int], alpha: float) -> dict[str, object]:
    """The settings of LoRA under which training goes on with llama.cpp's scale: alpha / r at each target."""
    common = max(1, Counter(ranks.values()).most_common(1)[0][0])
    names = exact_patterns(ranks)
    config: dict[str, object] = {
        "rank": common,
        "rank_pattern": {names[at]: rank for at, rank in ranks.items() if rank != common},
    }
    if alpha:
        return {**config, "alpha": alpha}
    return {**config, "alpha_pattern": {names[at]: float(max(1, rank)) for at, rank in ranks.items()}}
