"""Tables of PEFT's that map regular expressions for the ends of paths to values."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import attrs

from tunerkit.plugin import FileError, Matcher, TargetError, exact_patterns, file_matchers, is_broad

_LITERAL = re.compile(r"\^?(?:[\w.-]|\\\.)+")


@attrs.frozen
class PatternTable:
    """A table, sorted by how its patterns are looked up: a large model has hundreds of them.

    Attributes:
        paths: Values by whole path.
        ends: Values by the end of a path, cut at a dot.
        expressions: Values with the matcher of their regular expression.
        file: The file, for messages.
    """

    paths: Mapping[str, float]
    ends: Mapping[str, float]
    expressions: Sequence[tuple[Matcher, float]]
    file: Path

    @classmethod
    def of(cls, table: Mapping[str, float], file: Path) -> Self:
        """Sort a table of a file. Raises `FileError` for a malformed pattern."""
        literal = {key: value for key, value in table.items() if _LITERAL.fullmatch(key)}
        expressions = {key: rf"(?:.*\.)?(?:{key})" for key in table if key not in literal}
        try:
            matchers = file_matchers(expressions.values())
        except TargetError as error:
            raise _unusable(file, error) from error
        return cls(
            paths={_text(key[1:]): value for key, value in literal.items() if key.startswith("^")},
            ends={_text(key): value for key, value in literal.items() if not key.startswith("^")},
            expressions=[(matchers[text], table[key]) for key, text in expressions.items()],
            file=file,
        )

    def all_at(self, path: str) -> set[float]:
        """Return the values of all patterns that match a path, which PEFT compares from its end.

        Raises:
            FileError: The patterns take too long.
        """
        found = {self.paths[path]} if path in self.paths else set()
        found |= {self.ends[end] for end in _ends(path) if end in self.ends}
        try:
            return found | {value for matches, value in self.expressions if matches(path)}
        except TargetError as error:
            raise _unusable(self.file, error) from error


def _unusable(file: Path, error: TargetError) -> FileError:
    return FileError(f"{file}: a pattern in the metadata cannot be used: {error}")


def _text(literal: str) -> str:
    return literal.replace("\\.", ".")


def _ends(path: str) -> Iterator[str]:
    yield path
    yield from (path[number + 1 :] for number, character in enumerate(path) if character == ".")


def own_patterns(paths: Mapping[str, object]) -> dict[str, str]:
    """Return patterns of tunerkit's that match given paths and no other of them.

    A path is its own pattern unless another path ends with it: settings with plain names are easier to read.
    """
    longer = {end for path in paths for end in _ends(path) if end != path}
    exact = exact_patterns(paths)
    return {path: exact[path] if path in longer or is_broad(path) else path for path in paths}
