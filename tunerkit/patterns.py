"""Patterns that match module paths, for `targets`, `exclude` and per-target settings.

There are three kinds of pattern:

- a plain name, ``"q_proj"`` or ``"attention.query"``, matches the end of a path, cut at dots;
- a pattern with ``*``, ``?`` or ``[`` is a glob for the whole path, in which ``*`` also matches dots;
- ``"re:..."`` is a regular expression of `re` for the whole path.

`re` matches users' expressions only. Expressions from files are matched in bounded time: see `file_matchers`.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from re import _compiler, _constants as sre, _parser  # type: ignore[attr-defined]
from typing import Any, Final, TypeVar

from tunerkit.errors import TargetError, shown

_LONGEST: Final = 1000  # characters of an expression in a file
_STEPS: Final = 10_000_000  # of all patterns in a file together: about three seconds
# The steps that compiling costs: a character; a set, which may be a table of all characters; a glob.
_TO_COMPILE: Final = 20
_TO_COMPILE_SET: Final = 2000
_TO_COMPILE_GLOB: Final = 300
_TOO_MANY: Final = "the patterns in this file take too many steps; use plain names in it"
_COMPILED: Final = 4096  # patterns: a large model may have one for each target
Matcher = Callable[[str], bool]
Value = TypeVar("Value")


def matches(pattern: str, path: str) -> bool:
    """Check whether a pattern matches a dotted module path.

    Raises:
        TargetError: The pattern is malformed.
    """
    return matcher(pattern)(path)


def lookup(table: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return the value of a per-target setting for one target.

    Args:
        table: Maps target patterns to values. The first match counts.
        path: The target's dotted path.
        default: The value if no pattern matches.

    Raises:
        TargetError: A pattern is malformed.
    """
    return next((value for pattern, value in table.items() if matches(pattern, path)), default)


def exact_patterns(paths: Iterable[str]) -> dict[str, str]:
    """Return a pattern for each path that matches only that path; a plain name would also match longer paths."""
    return {path: f"re:{re.escape(path)}" for path in paths}


def is_broad(pattern: str) -> bool:
    """Check whether a pattern is a glob or a regular expression, which may match many kinds of modules."""
    return pattern.startswith("re:") or not {"*", "?", "["}.isdisjoint(pattern)


def is_exact(pattern: str) -> bool:
    """Check whether a pattern has the form from `exact_patterns`, so that it matches a single path."""
    return _literal(pattern) is not None


@functools.lru_cache(maxsize=_COMPILED)
def matcher(pattern: str) -> Matcher:
    """Return a function that checks whether a path matches a pattern.

    Raises:
        TargetError: A regular expression is malformed.
    """
    if not is_broad(pattern):
        return lambda path: path == pattern or path.endswith("." + pattern)
    if (literal := _literal(pattern)) is not None:  # an adapter from another program may have hundreds of these
        return lambda path: path == literal
    try:
        compiled = re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except Exception as error:  # also RecursionError and OverflowError
        raise _malformed(pattern, error) from error
    return lambda path: compiled.fullmatch(path) is not None


def _literal(pattern: str) -> str | None:
    """Return the path of a pattern from `exact_patterns`; None for any other pattern."""
    plain = re.sub(r"\\([^\w])", r"\1", pattern[3:])
    return plain if pattern == f"re:{re.escape(plain)}" else None


def _malformed(pattern: str, error: Exception) -> TargetError:
    return TargetError(f"{shown(pattern)} is not a regular expression: {str(error) or type(error).__name__}")


# --- Patterns in files ------------------------------------------------------------------------------------------------


def at_paths(config: Mapping[str, Any], paths: Collection[str], *, of_file: bool = False) -> dict[str, Any]:
    """Return a config in which exact patterns of matching paths replace regular expressions, as files store it.

    Files of earlier versions may contain regular expressions: with ``of_file``, they are matched in bounded time.
    Raises `TargetError` if an expression is malformed or, with ``of_file``, not supported or too slow.
    """

    def is_expression(key: str) -> bool:
        return key.startswith("re:") and not is_exact(key)

    tables = {name: table for name, table in config.items() if type(table) is dict and any(map(is_expression, table))}
    keys = [key for table in tables.values() for key in table]
    if of_file and len(keys) * (_TO_COMPILE_GLOB + len(paths)) > _STEPS:
        raise TargetError(_TOO_MANY)
    found = file_matchers(key[3:] for key in keys if of_file and is_expression(key))
    bounded = {f"re:{expression}": matches for expression, matches in found.items()}
    exact = exact_patterns(paths) if tables else {}

    def resolved(table: Mapping[str, Any]) -> dict[str, Any]:
        rows = [(bounded.get(key) or matcher(key), value) for key, value in table.items()]
        firsts = ((pattern, next((row for row in rows if row[0](path)), None)) for path, pattern in exact.items())
        return {pattern: row[1] for pattern, row in firsts if row is not None}

    return {name: resolved(value) if name in tables else value for name, value in config.items()}


def file_matchers(expressions: Iterable[str]) -> dict[str, Matcher]:
    """Return a matcher of whole paths for each regular expression in an untrusted file.

    `re` backtracks, which takes hours for some expressions. These matchers track all positions in a path at once, and
    share a limit of steps. References to groups, lookbehinds, flags and atomic groups are not supported.

    Args:
        expressions: The expressions, without ``re:``.

    Raises:
        TargetError: An expression is malformed, too long or not supported; or a matcher has exceeded the limit.
    """
    left = _STEPS

    def spend(steps: int) -> None:
        nonlocal left
        left -= steps
        if left < 0:
            raise TargetError(_TOO_MANY)

    return {expression: _bounded(expression, spend) for expression in expressions}


_Spend = Callable[[int], None]
_Follow = Callable[[str, set[int]], set[int]]  # from positions in a path where a match may begin to its possible ends


def _bounded(expression: str, spend: _Spend) -> Matcher:
    if len(expression) > _LONGEST:
        raise TargetError(f"{shown(expression)} is {len(expression)} characters long, the limit is {_LONGEST}")
    try:
        parsed = _parser.parse(expression)
        if parsed.state.flags != re.UNICODE:
            raise ValueError("flags such as (?i) are not supported in files; write [Aa] instead")
        follow = _sequence(parsed, spend)
    except TargetError:
        raise
    except Exception as error:
        raise _malformed(expression, error) from error
    return lambda path: len(path) in follow(path, {0})


def _sequence(parts: Any, spend: _Spend) -> _Follow:
    steps = [_part(parts.state, kind, value, spend) for kind, value in parts]

    def follow(path: str, places: set[int]) -> set[int]:
        for step in steps:
            spend(1 + len(places))
            places = step(path, places)
        return places

    return follow


def _part(state: Any, kind: Any, value: Any, spend: _Spend) -> _Follow:
    match kind:
        case sre.BRANCH:
            branches = [_sequence(branch, spend) for branch in value[1]]
            return lambda path, places: set().union(*(branch(path, places) for branch in branches))
        case sre.SUBPATTERN if not (value[1] or value[2]):
            return _sequence(value[3], spend)
        case sre.MAX_REPEAT | sre.MIN_REPEAT:
            return functools.partial(_repeated, value[0], value[1], _sequence(value[2], spend))
        case sre.ASSERT | sre.ASSERT_NOT if value[0] > 0:
            ahead, wanted = _sequence(value[1], spend), kind is sre.ASSERT
            return lambda path, places: {place for place in places if bool(ahead(path, {place})) is wanted}
        case sre.AT | sre.ANY | sre.LITERAL | sre.NOT_LITERAL | sre.IN:  # at most one character: no backtracking
            spend(_TO_COMPILE_SET if kind is sre.IN else _TO_COMPILE)
            one = _compiler.compile(_parser.SubPattern(state, [(kind, value)]))
            return lambda path, places: {end.end() for place in places if (end := one.match(path, place))}
    raise ValueError(f"{str(kind).lower()} is not supported in files")


def _repeated(least: int, most: int, step: _Follow, path: str, places: set[int]) -> set[int]:
    rounds = len(path) + 1  # further rounds reach no new positions
    ends: set[int] = set()
    for count in range(min(most, rounds) + 1):
        places = step(path, places) if count else places
        if count >= min(least, rounds):
            places = places - ends
            ends |= places
        if not places:
            break
    return ends
