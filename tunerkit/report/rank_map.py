"""Ranks by target path, laid out as layer x matrix."""

import re
from collections.abc import Iterable, Iterator, Mapping

import attrs


@attrs.frozen
class RankMap:
    """``cells[row][column]``: the live rank of one matrix in one layer, None where that layer has no such target."""

    layers: tuple[str, ...]
    matrices: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]

    @property
    def total(self) -> int:
        """All live triplets together: the budget, where it counts ranks."""
        return sum(cell for row in self.cells for cell in row if cell is not None)


def rank_map(ranks: Mapping[str, int]) -> RankMap:
    """Lay out ``tuner.ranks()``. A path's first number is its layer; what follows it names the matrix.

    Rows and columns keep the model's order. Paths without a number stand in a row of their own, named "-".
    """
    places = {path: _place(path) for path in ranks}
    stacks = {stack for stack, _, _ in places.values()}
    rows = dict.fromkeys(place[:2] for place in places.values())
    columns = dict.fromkeys(place[2] for place in places.values())
    found = {places[path]: rank for path, rank in ranks.items()}
    return RankMap(
        layers=tuple(_layer_label(stack, number, stacks) for stack, number in rows),
        matrices=tuple(shortened(columns)),
        cells=tuple(tuple(found.get((*row, column)) for column in columns) for row in rows),
    )


def shortened(names: Iterable[str]) -> Iterator[str]:
    """Each dotted name cut from the left to the shortest end that no other name has."""
    names = list(names)
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{other}" for other in names if other != name]
        yield next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name)


def _place(path: str) -> tuple[str, str, str]:
    """The stack, the layer's number and the matrix's name: ("bert.encoder.layer", "0", "attention.self.query")."""
    match = re.fullmatch(r"(.*?)\.?\b(\d+)\.(.+)", path)
    return (match[1], match[2], match[3]) if match else ("", "", path)


def _layer_label(stack: str, number: str, stacks: set[str]) -> str:
    if not number:
        return "-"
    if len(stacks - {""}) == 1:
        return number
    return f"{stack}.{number}".lstrip(".")
