"""Says where an error was raised: in the plugin's own code, and not in the library that it called."""

import linecache
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Final

# Those whose lines say nothing to an author: the cause is in the code that called them.
_LIBRARIES: Final = frozenset({"torch", "tunerkit", "pluggy", "attr", "attrs", "cattrs", "contextlib", "functools"})
_KIT: Final = ("tunerkit_testing.checks.", "tunerkit_testing.kit", "tunerkit_testing.remembering")


def told(error: BaseException) -> str:
    """Return an error's class, its text, the notes of core, and the line of the plugin that raised it.

    Args:
        error: Any error that was raised and caught.
    """
    first = f"{type(error).__name__}: {error}".rstrip()
    return "; ".join([first, *getattr(error, "__notes__", [])]) + place_of(error)


def place_of(error: BaseException) -> str:
    """Return the deepest line outside libraries that an error came through, or an empty text.

    Args:
        error: As in `told`.
    """
    lines = list(walk_tb(error.__traceback__))
    own = [(frame, number) for frame, number in lines if not _is_library(frame)] or lines
    if not own:
        return ""
    frame, number = own[-1]
    code = linecache.getline(frame.f_code.co_filename, number).strip()
    return f" in {Path(frame.f_code.co_filename).name}, line {number}" + (f": {code}" if code else "")


def _is_library(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in _LIBRARIES or name.startswith(_KIT)
