"""Ranks and sizes by target path, arranged as a table, layer by matrix, and as sums."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs


@attrs.frozen
class RankMap:
    """``cells[row][column]`` is the value of one matrix in one layer, or None if the layer has no such target."""

    layers: tuple[str, ...]
    matrices: tuple[str, ...]
    cells: tuple[tuple[Any, ...], ...]


def rank_map(ranks: Mapping[str, Any]) -> RankMap:
    """Arrange values by path in the model's order: by layer, the first number, and by the rest, the matrix, or "-"."""
    places = {path: _place(path) for path in ranks}
    stacks = {stack for stack, number, _ in places.values() if number}
    rows = dict.fromkeys(place[:2] for place in places.values())
    columns = dict.fromkeys(place[2] for place in places.values())
    found = {places[path]: rank for path, rank in ranks.items()}
    return RankMap(
        # The name of the only stack would say nothing.
        layers=tuple(
            (number if len(stacks) == 1 else f"{stack}.{number}".lstrip(".")) or "-" for stack, number in rows
        ),
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


def by_matrix_and_layer(sizes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sums by kind of matrix, the greatest first, and by layer; empty where all have the same."""
    map_ = rank_map(sizes)
    matrices = _sums(map_.matrices, zip(*map_.cells, strict=True))
    return dict(sorted(matrices.items(), key=lambda item: -item[1])), _sums(map_.layers, map_.cells)


def parts_of(amounts: Mapping[str, int]) -> Mapping[str, float]:
    """Return each amount as a share of their sum."""
    total = sum(amounts.values()) or 1
    return {name: amount / total for name, amount in amounts.items()}


def _sums(names: Sequence[str], lines: Iterable[Iterable[int | None]]) -> dict[str, int]:
    sums = {name: sum(filter(None, line)) for name, line in zip(names, lines, strict=True)}
    return sums if len(set(sums.values())) > 1 else {}
