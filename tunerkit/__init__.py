"""tunerkit: adapters for torch models, with methods that are plugins."""

import ast
import importlib
import pkgutil
from typing import Any

import pluggy

from tunerkit.extras import MOVED, QUANTISED, install

__version__ = "0.1.0"
hookimpl = pluggy.HookimplMarker(__name__)


def _public() -> dict[str, str]:
    """The public names, and the module of each; for a module that is public itself, an empty text.

    They stand in __init__.pyi, which type checkers and editors read too.
    """
    stub = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
    imports = (statement for statement in stub.body if isinstance(statement, ast.ImportFrom) and statement.level)
    return {alias.name: each.module or "" for each in imports for alias in each.names}


_places = _public()
__all__ = ["hookimpl", *(name for name, place in _places.items() if place)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and the command's help and errors need none."""
    if name in MOVED:  # an AttributeError would lose its text where the name is imported
        raise ImportError(f"tunerkit.{name} is {MOVED[name]} now: {install(QUANTISED)}")
    if name not in _places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = _places[name]
    module = importlib.import_module(f".{place or name}", __name__)
    globals()[name] = getattr(module, name) if place else module
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*_places, *__all__, *(name for name in globals() if name.startswith("__"))})
