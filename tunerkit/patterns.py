"""Patterns that match module paths, for `targets`, `exclude` and per-target settings.

There are three kinds of pattern:

- a plain name, ``"q_proj"`` or ``"attention.query"``, matches the end of a path, cut at dots;
- a pattern with ``*``, ``?`` or ``[`` is a glob for the whole path, in which ``*`` also matches dots;
- ``"re:..."`` is a regular expression of `re` for the whole path.

Python compiles the expressions of users only. Those in files are matched here, in bounded time, see `file_matchers`.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from re import _constants as sre, _parser  # type: ignore[attr-defined]
from typing import Any, Final, TypeVar

from tunerkit.errors import TargetError, shown

_LONGEST: Final = 1000  # characters of an expression in a file
_STEPS: Final = 10_000_000  # of all expressions of one table in a file together: about three seconds
_COMPILED: Final = 4096  # patterns: one for each target of a large model is nothing unusual
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
        TargetError: The pattern is malformed.
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
        TargetError: A pattern is malformed.
    """
    return next((value for pattern, value in table.items() if matches(pattern, path)), default)


def exact_patterns(paths: Iterable[str]) -> dict[str, str]:
    """Return patterns that match given paths and no other: a plain name also matches the end of longer ones.

    Args:
        paths: Dotted module paths.

    Returns:
        The pattern by path.
    """
    return {path: f"re:{re.escape(path)}" for path in paths}


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


@functools.lru_cache(maxsize=_COMPILED)
def matcher(pattern: str) -> Matcher:
    """Compile a pattern.

    Args:
        pattern: The pattern.

    Returns:
        A function that checks whether a path matches.

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
    """The one path that a pattern of `exact_patterns` matches; None for any other pattern."""
    plain = re.sub(r"\\([^\w])", r"\1", pattern[3:])
    return plain if pattern == f"re:{re.escape(plain)}" else None


def _malformed(pattern: str, error: Exception) -> TargetError:
    return TargetError(f"{shown(pattern)} is not a regular expression: {str(error) or type(error).__name__}")


# --- Patterns in files ------------------------------------------------------------------------------------------------


def at_paths(config: Mapping[str, Any], paths: Collection[str], *, of_file: bool = False) -> dict[str, Any]:
    """Return settings in which exact patterns replace a table with regular expressions.

    Files store settings in this form. Some of earlier versions hold the expressions themselves.

    Args:
        config: Settings by name, as JSON has them. A table maps target patterns to values.
        paths: The paths of the targets.
        of_file: Whether the settings come from a file, so that no expression in them is compiled.

    Raises:
        TargetError: An expression is malformed, or one of a file is not supported there or takes too long.
    """

    def resolved(table: Any) -> Any:
        keys = [key for key in table if key.startswith("re:") and not is_exact(key)] if type(table) is dict else []
        if not keys:
            return table
        bounded = file_matchers(key[3:] for key in keys) if of_file else {}
        rows = [(bounded.get(key[3:] if key in keys else "") or matcher(key), value) for key, value in table.items()]
        found = {
            exact: [value for match, value in rows if match(path)] for path, exact in exact_patterns(paths).items()
        }
        return {exact: values[0] for exact, values in found.items() if values}

    return {name: resolved(value) for name, value in config.items()}


def file_matchers(expressions: Iterable[str]) -> dict[str, Matcher]:
    """Return a matcher for each regular expression of a table in a file, which anybody may have written.

    The expressions are not compiled: a matcher follows all places in a path at once, so that it never goes back, and
    all of them share a number of steps. References to groups, flags and atomic groups are not supported.

    Args:
        expressions: The expressions, without ``re:``.

    Returns:
        For each of them a function that checks whether it matches the whole of a path.

    Raises:
        TargetError: An expression is malformed, too long or not supported; or, from a matcher, the steps are spent.
    """
    walk = _Walk()
    return {expression: walk.matcher(expression) for expression in expressions}


class _Walk:
    """Matches parsed expressions. The sets are places in a path: where a match begins, or where it may end."""

    def __init__(self) -> None:
        self.left = _STEPS

    def matcher(self, expression: str) -> Matcher:
        if len(expression) > _LONGEST:
            raise TargetError(f"{shown(expression)} is {len(expression)} characters long, the limit is {_LONGEST}")
        try:
            parsed = _parser.parse(expression)
            if parsed.state.flags != re.UNICODE:
                raise ValueError("flags are not supported in files")
            self.ends(parsed, "", {0})  # visits each part, so that an unsupported one is found now
        except TargetError:
            raise
        except Exception as error:
            raise _malformed(expression, error) from error
        return lambda path: len(path) in self.ends(parsed, path, {0})

    def ends(self, parts: Any, path: str, places: set[int]) -> set[int]:
        """Where matches of ``parts`` that begin at ``places`` may end."""
        for kind, value in parts:
            self.left -= 1 + len(places)
            if self.left < 0:
                raise TargetError("the regular expressions in this file take too many steps; use plain names in it")
            places = self._ends_of(kind, value, path, places)
        return places

    def _ends_of(self, kind: Any, value: Any, path: str, places: set[int]) -> set[int]:
        match kind:
            case sre.BRANCH:
                return set().union(*(self.ends(branch, path, places) for branch in value[1]))
            case sre.SUBPATTERN if not (value[1] or value[2]):
                return self.ends(value[3], path, places)
            case sre.MAX_REPEAT | sre.MIN_REPEAT:
                least, most, repeated = value
                return self._repeated(least, most, repeated, path, places)
            case sre.ASSERT | sre.ASSERT_NOT if value[0] > 0:
                wanted = kind is sre.ASSERT
                self.ends(value[1], path, set())  # so that what is in it is visited, also without a place
                return {place for place in places if bool(self.ends(value[1], path, {place})) is wanted}
            case sre.AT:
                return {place for place in places if _is_at(value, path, place)}
            case sre.ANY | sre.LITERAL | sre.NOT_LITERAL | sre.IN:
                return {place + 1 for place in places if place < len(path) and _is_one(kind, value, path[place])}
        raise ValueError(f"{str(kind).lower()} is not supported in files")

    def _repeated(self, least: int, most: int, parts: Any, path: str, places: set[int]) -> set[int]:
        found = set(places) if least == 0 else set()
        count = 0
        while count < most:
            before, count = places, count + 1
            places = self.ends(parts, path, places) - (found if count > least else set())
            found |= places if count >= least else set()
            if not places or (places == before and count < least):  # what matches nothing may be repeated for ever
                return found | places
        return found


def _is_at(where: Any, path: str, place: int) -> bool:
    match where:
        case sre.AT_BEGINNING | sre.AT_BEGINNING_STRING:
            return place == 0
        case sre.AT_END | sre.AT_END_STRING:
            return place == len(path)
    around = [0 <= at < len(path) and _is_one(sre.CATEGORY, sre.CATEGORY_WORD, path[at]) for at in (place - 1, place)]
    return (around[0] != around[1]) is (where is sre.AT_BOUNDARY)


def _is_one(kind: Any, value: Any, character: str) -> bool:
    """Whether a part that stands for one character accepts this one."""
    match kind:
        case sre.ANY:
            return character != "\n"
        case sre.LITERAL | sre.NOT_LITERAL:
            return (ord(character) == value) is (kind is sre.LITERAL)
        case sre.RANGE:
            return bool(value[0] <= ord(character) <= value[1])
        case sre.CATEGORY:
            name = str(value).removeprefix("CATEGORY_")
            found = {"DIGIT": character.isdecimal(), "SPACE": character.isspace()}.get(
                name.removeprefix("NOT_"), character.isalnum() or character == "_"
            )
            return found is not name.startswith("NOT_")
    negated = value[0][0] is sre.NEGATE
    return any(_is_one(part, inner, character) for part, inner in value[negated:]) is not negated
