"""Dotted module paths: their parts and layer numbers, whether they belong to an adapter, lists and tables of them."""

from collections.abc import Collection, Mapping, Sequence
from html import escape

CHILD = "tunerkit"  # the child of an adapted module that holds its adapters; never a target itself


def is_adapter_path(name: str) -> bool:
    """Whether a parameter with this dotted name belongs to an adapter: it is below a child named ``tunerkit``."""
    return CHILD in name.split(".")[:-1]


def is_under(path: str, roots: Collection[str]) -> bool:
    """Whether ``path`` or one of its ancestors is in ``roots``."""
    while path and roots:
        if path in roots:
            return True
        path = parent(path)
    return False


def parent(path: str) -> str:
    """The path of the parent module; empty if the parent is the model itself."""
    return path.rpartition(".")[0]


def join(path: str, name: str) -> str:
    """The path of the child ``name`` of ``path``."""
    return f"{path}.{name}" if path else name


def few(paths: Sequence[str], *, shown: int) -> str:
    """Return the first paths, each cut, and how many more there are, for a message: ``a, b and 3 more``."""
    more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
    return ", ".join(path if len(path) <= 200 else f"{path[:200]}..." for path in paths[:shown]) + more


def is_number(part: str) -> bool:
    """Whether ``part``, one part of a path, is an index."""
    return part.isascii() and part.isdigit()


def table_of(ranks: Mapping[str, int]) -> str:
    """Return ranks by path as a table in HTML: a row for each layer, a column for each matrix, shaded by rank.

    The first number in a path is its layer. The shade is a thin colour over the page's own background, so that dark
    pages can be read too. It is empty if nothing has a rank, or for more than 10,000 cells.
    """
    rows: dict[str, dict[str, int]] = {}
    for path, rank in ranks.items():
        parts = path.split(".")
        cut = next((at + 1 for at, part in enumerate(parts[:-1]) if is_number(part)), 0)
        rows.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = rank
    columns, top = dict.fromkeys(matrix for row in rows.values() for matrix in row), max(ranks.values(), default=0)
    if not top or len(rows) * len(columns) > 10_000:
        return ""
    lines = ["".join(f"<th>{escape(name).replace('.', '.<wbr>')}</th>" for name in ("", *columns))]
    for layer, row in rows.items():
        shades = {matrix: f"background:rgba(70,130,180,{0.6 * rank / top:.2f})" for matrix, rank in row.items()}
        cells = (f'<td style="{shades.get(matrix, "")}">{row.get(matrix, "")}</td>' for matrix in columns)
        lines.append(f"<th>{escape(layer)}</th>{''.join(cells)}")
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
