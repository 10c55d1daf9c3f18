"""tunerkit: adapters for torch models, with methods that are plugins."""

import ast
import importlib
import pkgutil
import sys
from typing import Any

import pluggy

from tunerkit.extras import elsewhere

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
    if name not in _places:
        # An AttributeError loses its text in `from tunerkit import name`, which asks through that function of Python's.
        is_imported = elsewhere(name) and sys._getframe(1).f_code.co_name == "_handle_fromlist"
        lacking = ImportError if is_imported else AttributeError
        raise lacking(f"module {__name__!r} has no attribute {name!r}{elsewhere(name)}")
    place = _places[name]
    module = importlib.import_module(f".{place or name}", __name__)
    globals()[name] = getattr(module, name) if place else module
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*_places, *__all__, *(name for name in globals() if name.startswith("__"))})
