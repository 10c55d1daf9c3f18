"""Ranks by target path, arranged as a table: layer by matrix."""

import re
from collections.abc import Iterable, Iterator, Mapping

import attrs


@attrs.frozen
class RankMap:
    """``cells[row][column]`` is the live rank of one matrix in one layer, or None if the layer has no such target."""

    layers: tuple[str, ...]
    matrices: tuple[str, ...]
    cells: tuple[tuple[int | None, ...], ...]

    @property
    def total(self) -> int:
        """The number of live triplets in all targets: the budget, if it counts ranks."""
        return sum(cell for row in self.cells for cell in row if cell is not None)


def rank_map(ranks: Mapping[str, int]) -> RankMap:
    """Arrange ``tuner.ranks()``. The first number in a path is its layer; the rest of the path names the matrix.

    Rows and columns keep the model's order. Paths without a number share a row named "-".
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
    """Shorten each dotted name to its shortest suffix that no other name ends with."""
    names = list(names)
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{other}" for other in names if other != name]
        yield next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name)


def _place(path: str) -> tuple[str, str, str]:
    """Split a path into stack, layer number and matrix: ("bert.encoder.layer", "0", "attention.self.query")."""
    match = re.fullmatch(r"(.*?)\.?\b(\d+)\.(.+)", path)
    return (match[1], match[2], match[3]) if match else ("", "", path)


def _layer_label(stack: str, number: str, stacks: set[str]) -> str:
    if not number:
        return "-"
    if len(stacks - {""}) == 1:
        return number
    return f"{stack}.{number}".lstrip(".")
