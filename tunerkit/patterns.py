"""Patterns that match module paths, for `targets`, `exclude` and per-target settings.

There are three kinds of pattern:

- a plain name, ``"q_proj"`` or ``"attention.query"``, matches the end of a path, cut at dots;
- a pattern with ``*``, ``?`` or ``[`` is a glob for the whole path, in which ``*`` also matches dots;
- ``"re:..."`` is a regular expression for the whole path, without recursion.

All globs and regular expressions of one call of the user (`wrap`, `load`, `attach`, `lookup`) share one second.
"""

import fnmatch
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

import attrs
import regex

from tunerkit.errors import TargetError, shown

SECONDS: Final = 1.0
_LONGEST: Final = 1000  # characters of a glob or regular expression
_FEW_STARS: Final = 4
_COMPILED: Final = 4096  # patterns: one for each target of a large model is nothing unusual
_LARGEST: Final = 10_000  # parts of a regular expression with its repeats written out; each takes about 4 kB
Matcher = Callable[[str], bool]
Value = TypeVar("Value")


@attrs.define(eq=False)
class _Allowance:
    """The time that is left for patterns, in seconds."""

    left: float = SECONDS

    def spend(self, pattern: str, work: Callable[[], Value]) -> Value:
        """Return what ``work`` returns. Raises `TargetError` if time ran out, or for anything that it raises."""
        start = time.thread_time()
        try:
            if self.left <= 0:
                raise TimeoutError
            return work()
        except TargetError:
            raise
        except TimeoutError as error:
            raise TargetError(
                f"the patterns up to {shown(pattern)} took longer than {SECONDS:g} s on the paths of this model; use "
                "globs or plain names, or a regular expression without nested repetition"
            ) from error
        except Exception as error:  # the library raises RecursionError, MemoryError and others too
            reason = str(error) or type(error).__name__
            raise TargetError(f"{shown(pattern)} is not a regular expression: {reason}") from error
        finally:
            self.left -= time.thread_time() - start


# State of a call: `lookup` has no argument through which a method's plugin could pass the allowance on.
_allowance: ContextVar[_Allowance | None] = ContextVar("allowance", default=None)


@contextmanager
def one_allowance() -> Iterator[None]:
    """Let all patterns that are compiled and matched in the block share one second. Inside another one, share that."""
    if _allowance.get() is not None:
        yield
        return
    token = _allowance.set(_Allowance())
    try:
        yield
    finally:
        _allowance.reset(token)


def matches(pattern: str, path: str) -> bool:
    """Check whether a pattern matches a path.

    Args:
        pattern: A plain name, a glob or a regular expression.
        path: A dotted module path.

    Returns:
        Whether it matches.

    Raises:
        TargetError: The pattern is malformed, or patterns took longer than a second in this call of the user.
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
        TargetError: A pattern is malformed, or patterns took longer than a second in this call of the user.
    """
    if not table:  # the usual case, asked for every target
        return default
    with one_allowance():
        return next((value for pattern, value in table.items() if matches(pattern, path)), default)


def exact_patterns(paths: Iterable[str]) -> dict[str, str]:
    """Return patterns that match given paths and no other: a plain name also matches the end of longer ones.

    Args:
        paths: Dotted module paths.

    Returns:
        The pattern by path.
    """
    return {path: _exact(path) for path in paths}


def _exact(path: str) -> str:
    return f"re:{re.escape(path)}"


def is_broad(pattern: str) -> bool:
    """Check whether a pattern is a glob or a regular expression, which may match many kinds of modules.

    Args:
        pattern: The pattern.

    Returns:
        False for a plain name.
    """
    return pattern.startswith("re:") or any(character in pattern for character in "*?[")


def is_exact(pattern: str) -> bool:
    """Check whether a pattern is one of `exact_patterns`, which names a single path.

    Args:
        pattern: The pattern.
    """
    return _literal(pattern) is not None


def matcher(pattern: str) -> Matcher:
    """Compile a pattern.

    Args:
        pattern: The pattern.

    Returns:
        A function that checks whether a path matches. It raises `TargetError` when the time of this call of the user is
        spent: one second for all patterns and paths.

    Raises:
        TargetError: A regular expression is malformed or too large, or the time is spent.
    """
    if not is_broad(pattern):
        return lambda path: path == pattern or path.endswith("." + pattern)
    if len(pattern) > _LONGEST:
        raise TargetError(f"{shown(pattern)} is {len(pattern)} characters long, the limit is {_LONGEST}; use several")
    is_glob = not pattern.startswith("re:")
    if (literal := _literal(pattern)) is not None:  # an adapter from another program may have hundreds of these
        return lambda path: path == literal
    if is_glob and pattern.count("*") <= _FEW_STARS:
        # The standard library matches it in linear time. Asking for the time would take longer than the match.
        plain = _glob(pattern)
        return lambda path: plain.match(path) is not None
    allowance = _allowance.get() or _Allowance()
    if is_glob:
        glob = allowance.spend(pattern, lambda: _glob(pattern))
        return lambda path: allowance.spend(pattern, lambda: glob.match(path) is not None)
    expression = allowance.spend(pattern, lambda: _expression(pattern))
    return lambda path: allowance.spend(pattern, lambda: expression.fullmatch(path, timeout=allowance.left) is not None)


@functools.lru_cache(maxsize=_COMPILED)
def _literal(pattern: str) -> str | None:
    """The one path that a pattern of `exact_patterns` matches; None for any other pattern."""
    plain = re.sub(r"\\([^\w])", r"\1", pattern.removeprefix("re:"))
    return plain if pattern == _exact(plain) else None


@functools.lru_cache(maxsize=_COMPILED)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


@functools.lru_cache(maxsize=_COMPILED)
def _expression(pattern: str) -> "regex.Pattern[str]":
    expression = pattern.removeprefix("re:")
    _refuse_unbounded(pattern, expression)
    return regex.compile(expression)


_TOKEN = re.compile(
    r"""(?P<refused>\(\?(?:R|&|P>|[+-]?\d|[a-z]*(?:x|V1)))  # calls of groups; flags that change what the rest means
    | (?P<one>\\. | \[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\])  # an escaped character, a set
    | (?P<none>\(\?\#[^)]*\) | [*?])  # a comment, repeats that copy nothing
    | (?P<repeat>\+ | \{(?P<least>\d*)(?:,\d*)?\})
    | (?P<open>\() | (?P<close>\)) | .""",
    re.VERBOSE | re.DOTALL,
)


def _refuse_unbounded(pattern: str, expression: str) -> None:
    """Raise `TargetError` for recursion, and for repeats in repeats whose compiled form would fill the memory.

    The library writes out the body of ``+`` twice and that of ``{9}`` ten times, so nested ones multiply.
    """
    outer: list[int] = []
    size = last = 0  # of the group that is open, and of what a repeat would follow
    for token in _TOKEN.finditer(expression):
        match token.lastgroup:
            case "refused":
                raise TargetError(
                    f"{shown(pattern)} has {token[0]!r}; recursion and the flags x and V1 are not supported in patterns"
                )
            case "none":
                continue
            case "open":
                outer.append(size)
                size = last = 0
            case "close":
                last = size + 1
                size = last + (outer.pop() if outer else 0)
            case "repeat":
                copies = 1 if token["least"] is None else int(token["least"] or 0)
                size += last * copies
                last += last * copies
            case _:
                size, last = size + 1, 1
    if (total := size + sum(outer)) > _LARGEST:
        raise TargetError(
            f"{shown(pattern)} has {total} parts with its repeats written out, the limit is {_LARGEST}; use fewer "
            "repeats inside repeats"
        )
