"""Find the tensors that contain NaN or inf."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_NOTHING: Mapping[str, Tensor] = {}
_CHUNK = 2**22  # values that are copied to be checked together


@torch.no_grad()
def nonfinite(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] = _NOTHING) -> list[str]:
    """Return the names of the tensors that contain NaN or inf. Small tensors are checked together.

    Args:
        tensors: Tensors by name. Integers, booleans and tensors without values are finite.
        base: The base model's own values by the same names. A tensor is not named where it only repeats them: a model
            may have a mask of -inf in a buffer.
    """
    alike: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        alike[tensor.device, tensor.dtype][name] = tensor
    found: set[str] = set()
    for (device, dtype), group in alike.items():
        if device.type != "meta" and (dtype.is_floating_point or dtype.is_complex):
            found.update(_nonfinite_of(group))
    return [name for name in tensors if name in found and not _repeats(tensors[name], base.get(name))]


def _nonfinite_of(group: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the names; the tensors are alike. Small ones are checked together, and one by one only if that fails."""
    chunk: dict[str, Tensor] = {}
    size = 0
    for name, tensor in group.items():
        if size + tensor.numel() > _CHUNK:
            yield from _nonfinite_in(chunk)
            chunk, size = {}, 0
        chunk[name] = tensor
        size += tensor.numel()
    yield from _nonfinite_in(chunk)


def _nonfinite_in(chunk: Mapping[str, Tensor]) -> Iterator[str]:
    parts = [_flat(tensor) for tensor in chunk.values()]
    if len(parts) == 1 or (parts and not _is_finite(torch.cat(parts))):
        yield from (name for name, part in zip(chunk, parts, strict=True) if not _is_finite(part))


def _is_finite(values: Tensor) -> bool:
    # The extremes of a tensor with a NaN are NaN. This takes one pass and no memory, unlike `isfinite().all()`.
    return not values.numel() or all(map(math.isfinite, torch.stack(torch.aminmax(values)).tolist()))


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
