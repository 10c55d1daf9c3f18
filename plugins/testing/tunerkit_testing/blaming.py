"""Says where a cause lies: the plugin's line that raised an error, and the values of a plugin that changed."""

import copy
import linecache
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from types import FrameType, ModuleType
from typing import Any, Final

import attrs
import numpy
import torch
from torch import Tensor, nn

# Those whose lines say nothing to an author: the cause is in the code that called them.
_LIBRARIES: Final = frozenset({"torch", "tunerkit", "pluggy", "attr", "attrs", "cattrs", "contextlib", "functools"})
_KIT: Final = ("tunerkit_testing.checks.", "tunerkit_testing.runner", "tunerkit_testing.cases")


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
    return _is_of_library(frame.f_globals.get("__name__", ""))


def _is_of_library(module: str) -> bool:
    return module.partition(".")[0] in {*_LIBRARIES, "builtins", "abc", "typing"} or module.startswith(_KIT)


def values_in(thing: object, name: str = "", deep: int = 4) -> Iterator[tuple[str, object]]:
    """Yield copies of the plain values and tensors in an object, each with the expression that leads to it.

    Modules, classes and functions are left out.

    Args:
        thing: Any object.
        name: The expression for it.
        deep: How far to look into containers and objects.
    """
    if isinstance(thing, Tensor):
        yield name, thing.detach().clone()
    elif isinstance(thing, torch.Generator):
        yield name, thing.get_state()
    elif isinstance(thing, numpy.ndarray):
        yield name, thing.tobytes()
    elif isinstance(thing, bool | int | float | str | bytes | complex | set | frozenset | None):
        yield name, copy.copy(thing)
    elif isinstance(thing, nn.Module | ModuleType | type) or callable(thing) or not deep:
        return
    elif isinstance(thing, Mapping):
        for key in list(thing):
            yield from values_in(thing[key], f"{name}[{key!r}]", deep - 1)
    elif isinstance(thing, Iterable) and hasattr(thing, "__len__"):
        for number, each in enumerate(islice(thing, 1000)):
            yield from values_in(each, f"{name}[{number}]", deep - 1)
    else:
        kind: Any = type(thing)  # an attrs class may have slots in place of a __dict__
        names = dict.fromkeys(
            [*vars_of(thing), *([field.name for field in attrs.fields(kind)] if attrs.has(kind) else [])]
        )
        for own in names:
            yield from values_in(getattr(thing, own, None), f"{name}.{own}", deep - 1)
        if not names:  # such as itertools.count, which shows where it is
            yield name, repr(thing)


def vars_of(thing: object) -> Mapping[str, Any]:
    """Return an object's attributes; none if it has no ``__dict__``."""
    return getattr(thing, "__dict__", {})


def lasting_values(plugin: object, parts: Iterable[object]) -> dict[str, object]:
    """Copy what outlives an adapter: the values of the plugin, of its classes, and of the modules that define these.

    Args:
        plugin: The plugin object.
        parts: What it built.
    """
    classes = dict.fromkeys(
        each for part in (plugin, *parts) for each in type(part).__mro__ if not _is_of_library(each.__module__)
    )
    modules = dict.fromkeys(sys.modules[each.__module__] for each in classes if each.__module__ in sys.modules)
    places: dict[str, object] = {each.__name__: each for each in modules}
    places |= {each.__qualname__: each for each in classes} | {"the plugin": plugin}
    found: dict[str, object] = {}
    for place, thing in places.items():
        for name, value in list(vars_of(thing).items()):
            if not name.startswith("__"):
                found.update(values_in(value, f"{place}.{name}"))
    return found


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Return the names of values that are others now, came, or went.

    Args:
        before: Values by name.
        after: Later ones.
    """
    names = dict.fromkeys([*before, *after])
    return [name for name in names if not _same(before.get(name, names), after.get(name, names))]


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other or one != one)
