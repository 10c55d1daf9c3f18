"""Patterns that match module paths, for `targets`, `exclude` and per-target settings.

There are three kinds of pattern:

- a plain name, ``"q_proj"`` or ``"attention.query"``, matches the end of a path, cut at dots;
- a pattern with ``*``, ``?`` or ``[`` is a glob for the whole path, in which ``*`` also matches dots;
- ``"re:..."`` is a regular expression for the whole path. Matching is limited to one second for the whole model.
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
    """Whether ``pattern`` matches ``path``.

    Raises `TargetError` if a regular expression is malformed or takes longer than a second.
    """
    return matcher(pattern)(path)


def lookup(table: Mapping[str, Value], path: str, default: Value) -> Value:
    """Look up a per-target setting.

    Args:
        table: Maps target patterns to values. The first match counts.
        path: The target's dotted path.
        default: The value if no pattern matches.

    Raises:
        TargetError: A regular expression is malformed or takes longer than a second.
    """
    return next((value for pattern, value in table.items() if matches(pattern, path)), default)


def is_broad(pattern: str) -> bool:
    """Whether ``pattern`` is a glob or a regular expression, which may match many kinds of module."""
    return pattern.startswith("re:") or any(character in pattern for character in "*?[")


def matcher(pattern: str) -> Matcher:
    """Compile ``pattern`` into a function of a path. It raises `TargetError` like `matches`."""
    if pattern.startswith("re:"):
        return _regex_matcher(pattern)
    if is_broad(pattern):
        return lambda path: fnmatchcase(path, pattern)
    return lambda path: path == pattern or path.endswith("." + pattern)


def _regex_matcher(pattern: str) -> Matcher:
    """The limit is for all paths together: with a limit per path, a large model could take hours."""
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
