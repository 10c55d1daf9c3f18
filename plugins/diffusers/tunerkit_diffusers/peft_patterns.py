"""Tables of PEFT's that map regular expressions for the ends of paths to values."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import attrs

from tunerkit import FileError, TargetError
from tunerkit.patterns import exact_patterns, is_broad, matches

_LITERAL = re.compile(r"\^?(?:[\w.-]|\\\.)+")


@attrs.frozen
class PatternTable:
    """A table, sorted by how its patterns are looked up: a large model has hundreds of them.

    Attributes:
        paths: Values by whole path.
        ends: Values by the end of a path, cut at a dot.
        expressions: Values by regular expression.
        file: The file, for messages.
    """

    paths: Mapping[str, float]
    ends: Mapping[str, float]
    expressions: Mapping[str, float]
    file: Path

    @classmethod
    def of(cls, table: Mapping[str, float], file: Path) -> Self:
        """Sort a table of a file."""
        literal = {key: value for key, value in table.items() if _LITERAL.fullmatch(key)}
        return cls(
            paths={_text(key[1:]): value for key, value in literal.items() if key.startswith("^")},
            ends={_text(key): value for key, value in literal.items() if not key.startswith("^")},
            expressions={key: value for key, value in table.items() if key not in literal},
            file=file,
        )

    def all_at(self, path: str) -> set[float]:
        """Return the values of all patterns that match a path, which PEFT compares from its end.

        Raises:
            FileError: A pattern is malformed, or takes too long.
        """
        found = {self.paths[path]} if path in self.paths else set()
        found |= {self.ends[end] for end in _ends(path) if end in self.ends}
        try:
            return found | {
                value for key, value in self.expressions.items() if matches(rf"re:(?:.*\.)?(?:{key})", path)
            }
        except TargetError as error:
            raise FileError(f"{self.file}: a pattern in the metadata cannot be used: {error}") from error


def _text(literal: str) -> str:
    return literal.replace("\\.", ".")


def _ends(path: str) -> Iterator[str]:
    yield path
    yield from (path[number + 1 :] for number, character in enumerate(path) if character == ".")


def own_patterns(paths: Mapping[str, object]) -> dict[str, str]:
    """Return patterns of tunerkit's that match given paths and no other of them.

    A path is its own pattern unless another path ends with it: hundreds of regular expressions would take longer than
    tunerkit allows for all patterns of a config.
    """
    longer = {end for path in paths for end in _ends(path) if end != path}
    exact = exact_patterns(paths)
    return {path: exact[path] if path in longer or is_broad(path) else path for path in paths}
