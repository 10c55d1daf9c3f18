"""Dotted paths of modules: their parts, their numbers, and which of them lie in an adapter."""

from collections.abc import Collection

CHILD = "tunerkit"  # the child of a base layer that holds its adapters: never a target itself


def is_adapter_path(name: str) -> bool:
    """Whether a parameter's dotted name lies in an adapter (below a child named ``tunerkit``)."""
    return CHILD in name.split(".")[:-1]


def is_under(path: str, roots: Collection[str]) -> bool:
    """Whether ``path`` or one of the containers it lies in is among ``roots``."""
    while path and roots:
        if path in roots:
            return True
        path = parent(path)
    return False


def parent(path: str) -> str:
    """The path of the container that ``path`` lies in; empty for the model itself."""
    return path.rpartition(".")[0]


def join(path: str, name: str) -> str:
    """The path of ``name`` inside ``path``."""
    return f"{path}.{name}" if path else name


def is_number(part: str) -> bool:
    """Whether a part of a path is an index."""
    return part.isascii() and part.isdigit()
