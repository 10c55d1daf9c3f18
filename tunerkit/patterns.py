"""Patterns over module paths, as `targets`, `exclude` and per-target settings are written.

A pattern is written in one of three ways:

- a plain name, ``"q_proj"`` or ``"attention.query"``: the whole end of a dotted path, cut only at dots;
- with ``*``, ``?`` or ``[``: a glob over the whole path, where ``*`` also crosses dots;
- ``"re:..."``: a regular expression that matches the whole path, and has a second for the whole model.
"""

import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

import regex

from tunerkit.errors import TargetError

REGEX_SECONDS = 1.0
Matcher = Callable[[str], bool]
Value = TypeVar("Value")


def matches(pattern: str, path: str) -> bool:
    """Whether ``pattern`` selects the module at ``path``.

    Raises `TargetError` for a regular expression that is malformed or takes longer than a second.
    """
    return matcher(pattern)(path)


def lookup(table: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first pattern of ``table`` that matches ``path``, else ``default``."""
    return next((value for pattern, value in table.items() if matches(pattern, path)), default)


def is_broad(pattern: str) -> bool:
    """Whether ``pattern`` is a glob or a regular expression, which choose broadly; a plain name does not."""
    return pattern.startswith("re:") or any(character in pattern for character in "*?[")


def matcher(pattern: str) -> Matcher:
    """A test of paths against ``pattern``; raises `TargetError` as `matches` does."""
    if pattern.startswith("re:"):
        return _regex_matcher(pattern)
    if is_broad(pattern):
        return lambda path: fnmatchcase(path, pattern)
    return lambda path: path == pattern or path.endswith("." + pattern)


def _regex_matcher(pattern: str) -> Matcher:
    """One second for all paths together: a bound per path would let a large model take hours."""
    try:
        compiled = regex.compile(pattern.removeprefix("re:"))
    except regex.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression: {error}") from error
    left = REGEX_SECONDS

    def match(path: str) -> bool:
        nonlocal left
        start = time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            return compiled.fullmatch(path, timeout=left) is not None
        except TimeoutError as error:
            raise TargetError(
                f"{pattern!r} took longer than {REGEX_SECONDS:g} s on the paths of this model; use a glob or plain "
                "names, or a regular expression without nested repetition"
            ) from error
        finally:
            left -= time.monotonic() - start

    return match
