"""Where the parameters of an adapter went: sums by kind of matrix and by layer."""

from collections.abc import Iterable, Mapping, Sequence

from tunerkit_cli.report.rank_map import rank_map


def by_matrix(sizes: Mapping[str, int]) -> Mapping[str, int]:
    """Return the sum of each kind of matrix over all layers, the greatest first; empty if all have the same."""
    map_ = rank_map(sizes)
    found = _sums(map_.matrices, zip(*map_.cells, strict=True))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def by_layer(sizes: Mapping[str, int]) -> Mapping[str, int]:
    """Return the sum of each layer over its matrices, in the model's order; empty if all have the same."""
    map_ = rank_map(sizes)
    return _sums(map_.layers, map_.cells)


def parts_of(amounts: Mapping[str, int]) -> Mapping[str, float]:
    """Return each amount as a share of their sum."""
    total = sum(amounts.values()) or 1
    return {name: amount / total for name, amount in amounts.items()}


def _sums(names: Sequence[str], lines: Iterable[Iterable[int | None]]) -> dict[str, int]:
    sums = {name: sum(filter(None, line)) for name, line in zip(names, lines, strict=True)}
    return sums if len(set(sums.values())) > 1 else {}
