"""Dotted module paths: their parts, layer numbers, whether they belong to an adapter, and short lists of them."""

from collections.abc import Collection, Sequence

CHILD = "tunerkit"  # the name of the child of an adapted module that has its adapters; never a target itself


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
    """Return the path of the parent module; "" if the parent is the model itself."""
    return path.rpartition(".")[0]


def join(path: str, name: str) -> str:
    """Return the path of the child ``name`` of the module at ``path``."""
    return f"{path}.{name}" if path else name


def few(paths: Sequence[str], *, shown: int) -> str:
    """Return the first paths, each shortened, and the number of the others, for a message: ``a, b and 3 more``."""
    more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
    return ", ".join(path if len(path) <= 200 else f"{path[:200]}..." for path in paths[:shown]) + more


def is_number(part: str) -> bool:
    """Whether ``part``, one part of a path, is a number, such as ``0`` in ``layers.0``."""
    return part.isascii() and part.isdigit()
