"""This rank's shards of an adapter's parameters, for methods that do not need gathered ones."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from tunerkit.plugin import Pieces
from tunerkit_distributed import group
from tunerkit_distributed.dtensors import Part, is_split, part_of, whole_values
from tunerkit_distributed.flat import flat, unflatten_


@attrs.frozen(eq=False)
class CutPieces(Pieces):
    """Shards of DTensors, all over the same process group.

    Attributes:
        parts: The layout of each parameter.
    """

    parts: Sequence[Part]
    are_cut = True

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor], what: str) -> None:
        """See `Pieces`."""
        if not tensors:
            return
        own = flat(tensors)
        vector = own.to(self.parts[0].parameter.device_mesh.device_type)
        group.reduce_(vector, what, within=self.parts[0].group)
        unflatten_(vector.to(own.device), tensors)

    @torch.no_grad()
    def joined(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """See `Pieces`. One all-gather for each dtype and device."""
        return whole_values(tensors, self.parts, what)

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Pieces`."""
        return [part.cut.part(tensor, part.number) for tensor, part in zip(tensors, self.parts, strict=True)]


@torch.no_grad()
def pieces_of(parameters: Sequence[Any]) -> Pieces:
    """Return this rank's shards of DTensors that are all sharded over the same process group.

    Args:
        parameters: The DTensors. Any: torch.distributed.tensor is imported late.
    """
    layouts: dict[tuple[object, ...], Part] = {}  # thousands of parameters have a few layouts
    parts = []
    for parameter in parameters:
        key = parameter.device_mesh, parameter.placements, parameter.shape
        like = layouts.get(key)
        if like is None:
            like = layouts[key] = part_of(parameter, [])
        parts.append(Part(parameter, [], like.cut, like.group, like.number))
    grads = [None if parameter.grad is None else parameter.grad.to_local() for parameter in parameters]
    starts = [(part.cut.dim, part.cut.rows(part.number).start) for part in parts]
    return CutPieces([parameter.to_local() for parameter in parameters], grads, starts, parts)


def are_cut_alike(parameters: Sequence[Tensor]) -> bool:
    """Whether all parameters are DTensors over the same process group, as `pieces_of` requires."""
    return all(map(is_split, parameters)) and len({part_of(parameter, []).group for parameter in parameters}) == 1
