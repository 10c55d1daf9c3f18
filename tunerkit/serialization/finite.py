"""Find the tensors that contain NaN or inf."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_NOTHING: Mapping[str, Tensor] = {}
_CHUNK = 2**22  # values that are copied to be checked together


@torch.no_grad()
def nonfinite(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] = _NOTHING) -> list[str]:
    """Return the names of the tensors that contain NaN or inf. Small tensors take one transfer together.

    Args:
        tensors: Tensors by name. Integers, booleans and tensors without values are finite.
        base: The base model's own values by the same names. A tensor is not named where it only repeats them: a model
            may have a mask of -inf in a buffer.
    """
    checked = {name: t for name, t in tensors.items() if _may_overflow(t) and t.numel() and not t.is_meta}
    alike: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    for name, tensor in checked.items():
        alike[tensor.device, tensor.dtype].append(name)
    found = {name for names in alike.values() for name in _nonfinite_of(checked, names)}
    return [name for name in tensors if name in found and not _repeats(tensors[name], base.get(name))]


def _may_overflow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _nonfinite_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[str]:
    """Yield the names; the tensors are alike. Small ones are checked together, and one by one only if that fails."""
    for together in _chunks(tensors, names):
        parts = [_flat(tensors[name].detach()) for name in together]
        if len(parts) == 1:
            yield from () if _is_finite(parts[0]) else together
        elif not _is_finite(torch.cat(parts)):
            yield from (name for name, part in zip(together, parts, strict=True) if not _is_finite(part))


def _chunks(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[list[str]]:
    """Cut ``names`` into lists with at most `_CHUNK` values each; a larger tensor is alone."""
    chunk: list[str] = []
    size = 0
    for name in names:
        if chunk and size + tensors[name].numel() > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(name)
        size += tensors[name].numel()
    yield chunk


def _is_finite(values: Tensor) -> bool:
    # The extremes of a tensor with a NaN are NaN. This takes one pass and no memory, unlike `isfinite().all()`.
    return all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist()))


def _flat(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj()).reshape(-1)
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).reshape(-1)  # 8-bit floats cannot be compared


def _repeats(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether the values that are not finite are the base's own."""
    if base is None or base.shape != tensor.shape or base.is_meta:
        return False
    base = base.to(tensor.device)
    return bool((tensor.isfinite() | (tensor == base) | (tensor.isnan() & base.isnan())).all())
