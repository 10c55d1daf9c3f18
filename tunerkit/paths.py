"""Dotted module paths: their parts, layer numbers, whether they belong to an adapter, and how messages list them."""

from collections.abc import Collection, Iterable, Sequence
from itertools import islice

_LONGEST = 240  # characters of one name in a message: a file may contain names of any length
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


def short(text: object, *, longest: int = _LONGEST) -> str:
    """Return ``text`` for a message: if it is long, its start and its length."""
    whole = str(text)
    return whole if len(whole) <= longest else f"{whole[:longest]}... ({len(whole)} characters)"


def few(paths: Sequence[str], *, shown: int) -> str:
    """Return the first paths and how many more there are, for a message: ``a, b and 3 more``."""
    more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
    return ", ".join(map(short, paths[:shown])) + more


def listed(title: str, lines: Iterable[str], *, shown: int = 12) -> str:
    """Return a message of a title and a list: one line per entry, and how many more entries there are."""
    rest = iter(lines)
    first = [short(line, longest=5 * _LONGEST) for line in islice(rest, shown)]
    more = sum(1 for _ in rest)
    return "\n- ".join([title, *first, *([f"and {more} more"] if more else [])])


def is_number(part: str) -> bool:
    """Whether ``part``, one part of a path, is an index."""
    return part.isascii() and part.isdigit()
