"""What a process holds of an adapter's parameters, for methods that do without whole ones."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from tunerkit.parallel import group
from tunerkit.parallel.dtensors import Part, is_split, part_of, whole_values
from tunerkit.parallel.flat import flat, unflatten_

_WHOLE = (0, 0)


@attrs.frozen(eq=False)
class Pieces:
    """What this process holds of parameters: all of them, unless an engine has cut them.

    Attributes:
        values: What it holds of each parameter: the memory itself.
        grads: What it holds of their gradients; None for a parameter without one.
        starts: The dimension along which each is cut, and the first index of the piece in it.
        are_cut: Whether other processes hold other pieces.
    """

    values: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    starts: Sequence[tuple[int, int]]
    are_cut = False

    def sum_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Replace tensors by their sums over the processes that share the parameters. One collective for all.

        Args:
            tensors: The tensors to overwrite, of the same shapes in all processes.
            what: What they are, for messages.
        """

    def joined(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """Put whole tensors together. All processes must call this.

        Args:
            tensors: One for each parameter, cut as that is.
            what: What they are, for messages.
        """
        return list(tensors)

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Cut tensors as the parameters are, into views. No collective.

        Args:
            tensors: One for each parameter, of its whole shape.
        """
        return list(tensors)


@attrs.frozen(eq=False)
class CutPieces(Pieces):
    """Pieces of DTensors, all cut over the same processes.

    Attributes:
        parts: How each is cut.
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


def whole_pieces(parameters: Sequence[Tensor]) -> Pieces:
    """The pieces of parameters that are whole."""
    return Pieces(parameters, [parameter.grad for parameter in parameters], [_WHOLE] * len(parameters))


@torch.no_grad()
def pieces_of(parameters: Sequence[Any]) -> Pieces:
    """What this process holds of DTensors that are cut over the same processes.

    Args:
        parameters: The DTensors. Any: torch.distributed.tensor is imported late.
    """
    layouts: dict[tuple[object, ...], Part] = {}  # thousands of parameters have few layouts
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
    """Whether parameters are DTensors, cut over the same processes, so that `pieces_of` takes them."""
    return all(map(is_split, parameters)) and len({part_of(parameter, []).group for parameter in parameters}) == 1
