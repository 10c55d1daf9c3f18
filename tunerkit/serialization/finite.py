"""Find the tensors that contain NaN or inf."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_NOTHING: Mapping[str, Tensor] = {}


@torch.no_grad()
def nonfinite(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] = _NOTHING) -> list[str]:
    """Return the names of the tensors that contain NaN or inf, with one transfer per device and dtype.

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


def _nonfinite_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    # The extremes of a tensor with a NaN are NaN. This takes one pass and no memory, unlike `isfinite().all()`.
    extremes = [value for name in names for value in torch.aminmax(_comparable(tensors[name].detach()))]
    values = torch.stack(extremes).tolist()
    pairs = zip(names, values[::2], values[1::2], strict=True)
    return [name for name, low, high in pairs if not (math.isfinite(low) and math.isfinite(high))]


def _comparable(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8-bit floats cannot be compared


def _repeats(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether the values that are not finite are the base's own."""
    if base is None or base.shape != tensor.shape or base.is_meta:
        return False
    base = base.to(tensor.device)
    return bool((tensor.isfinite() | (tensor == base) | (tensor.isnan() & base.isnan())).all())
