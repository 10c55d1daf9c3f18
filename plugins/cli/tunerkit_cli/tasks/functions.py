"""Functions in a user's files, which a recipe names as ``FILE.py:FUNCTION``: metrics and rewards."""

import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from tunerkit.errors import ConfigError, FileError, closest, shown
from tunerkit_transformers.pretrained import closest_path

Function = Callable[..., Any]


def refuse_code(key: str, named: str, *, allowed: bool) -> None:
    """Raise `TunerkitError` if the file of a function, which a recipe names at ``key``, is missing or may not run."""
    path = named.rpartition(":")[0]
    if path and not os.path.isfile(path):
        raise FileError(f"{key}: {path}: no such file{closest_path(path)}")
    if path and not allowed:
        raise ConfigError([f"{key}: {named} is code; read it, and pass --allow-code to run it"])


def refuse_namesakes(key: str, named: Sequence[str]) -> None:
    """Raise `ConfigError` if two functions that a recipe names at ``key`` have one name, by which both are told."""
    names = [each.rpartition(":")[2] for each in named]
    for place, (each, name) in enumerate(zip(named, names, strict=True)):
        if (first := names.index(name)) != place:
            do = "leave one out" if named[first] == each else "rename a function"
            raise ConfigError([f"{key}: {named[first]} and {each} have the same name; {do}"])


def function_of(key: str, named: str, known: Mapping[str, Function] = MappingProxyType({})) -> tuple[str, Function]:
    """Return the name of a function and the function: one of the ``known`` ones, or of a file, which is run for it."""
    path, _, name = named.rpartition(":")
    try:
        found = _functions(os.path.realpath(path)) if path else known
    except (Exception, SystemExit) as problem:
        raise ConfigError([f"{key}: {path} cannot be run: {type(problem).__name__}: {problem}"]) from problem
    if name not in found:
        others = f"pass one of {', '.join(known)}, or FILE.py:FUNCTION" if known else "pass FILE.py:FUNCTION"
        hint = closest(name.casefold(), found) or f"; {others}"
        what = f"{path} has no function" if path else "there is none named"
        raise ConfigError([f"{key}: {what} {shown(name)}{hint}"])
    return name, found[name]


@cache  # so that a file is run once
def _functions(path: str) -> dict[str, Function]:
    """The functions of a file with a full path, which may import what is beside it, also when they are called."""
    sys.path.append(os.path.dirname(path))
    return {key: each for key, each in runpy.run_path(path).items() if callable(each)}
