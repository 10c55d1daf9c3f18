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
    """Check whether a pattern matches a path.

    Args:
        pattern: A plain name, a glob or a regular expression.
        path: A dotted module path.

    Returns:
        Whether it matches.

    Raises:
        TargetError: A regular expression is malformed or takes longer than a second.
    """
    return matcher(pattern)(path)


def lookup(table: Mapping[str, Value], path: str, default: Value) -> Value:
    """Look up a per-target setting.

    Args:
        table: Maps target patterns to values. The first match counts.
        path: The target's dotted path.
        default: The value if no pattern matches.

    Returns:
        The value of the first pattern that matches, or ``default``.

    Raises:
        TargetError: A regular expression is malformed or takes longer than a second.
    """
    return next((value for pattern, value in table.items() if matches(pattern, path)), default)


def is_broad(pattern: str) -> bool:
    """Check whether a pattern is a glob or a regular expression, which may match many kinds of modules.

    Args:
        pattern: The pattern.

    Returns:
        False for a plain name.
    """
    return pattern.startswith("re:") or any(character in pattern for character in "*?[")


def matcher(pattern: str) -> Matcher:
    """Compile a pattern.

    Args:
        pattern: The pattern.

    Returns:
        A function that checks whether a path matches. It raises `TargetError` if a regular expression takes longer than
        a second for all paths together.

    Raises:
        TargetError: A regular expression is malformed.
    """
    if pattern.startswith("re:"):
        return _regex_matcher(pattern)
    if is_broad(pattern):
        return lambda path: fnmatchcase(path, pattern)
    return lambda path: path == pattern or path.endswith("." + pattern)


def _regex_matcher(pattern: str) -> Matcher:
    """The time limit covers all paths together. With a limit per path, a large model could take hours."""
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
