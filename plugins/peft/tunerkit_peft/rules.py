"""PEFT's rules for the rank and the alpha of a module, from patterns whose order its JSON has lost."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import attrs

from tunerkit.errors import shown
from tunerkit.plugin import FileError, TargetError, file_matchers
from tunerkit_peft.adapter_config import Settings

Value = TypeVar("Value")
# Nothing in it repeats or chooses, so the standard library matches it at once. Files have hundreds of these.
_SIMPLE: Final = re.compile(r"\^?(?:[\w-]|\.|\\[^\w])+")


@attrs.frozen
class Rule:
    """What the settings say of one module.

    Attributes:
        ranks: The ranks that they allow: ``r``, or those of the patterns that match.
        alpha: The numerator of its scale.
    """

    ranks: frozenset[int]
    alpha: float


def rules_for(settings: Settings, paths: Iterable[str]) -> dict[str, Rule]:
    """Apply ``rank_pattern`` and ``alpha_pattern`` to module paths, as PEFT does.

    Where several patterns match, PEFT takes the first one, but it has sorted them in the file. So the rank must be that
    of one of them, and the alpha must be the same in all.

    Args:
        settings: The adapter's settings.
        paths: The modules' paths.

    Raises:
        FileError: A pattern is malformed or takes too many steps, or the alpha of a module is ambiguous.
    """
    file, there = settings.common.file, list(paths)
    ranks = matched(file, "rank_pattern", settings.ranks, there)
    alphas = matched(file, "alpha_pattern", settings.alphas, there)
    return {
        path: Rule(
            frozenset(ranks[path].values()) or frozenset({settings.rank}),
            agreed(file, "alpha_pattern", alphas[path], path, settings.alpha),
        )
        for path in there
    }


def matched(file: Path, field: str, table: Mapping[str, Value], paths: Iterable[str]) -> dict[str, dict[str, Value]]:
    r"""Return the patterns that match each path, with their values.

    PEFT compares ``(.*\.)?(PATTERN)`` with a whole path.

    Raises:
        FileError: A pattern is malformed or takes too many steps.
    """
    whole = {pattern: rf"(.*\.)?({pattern})" for pattern in table}
    simple = {text: re.compile(text) for pattern, text in whole.items() if _SIMPLE.fullmatch(pattern)}
    try:
        others = file_matchers(text for text in whole.values() if text not in simple)
        matches = {pattern: others.get(text) or simple[text].fullmatch for pattern, text in whole.items()}
        return {path: {each: table[each] for each in table if matches[each](path)} for path in paths}
    except TargetError as error:
        raise FileError(
            f"{file}: {field!r} has a pattern that cannot be used: {error}. Replace it with the names of the modules"
        ) from error


def agreed(file: Path, field: str, found: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return the value of the patterns that match a path; the default if none does.

    Raises:
        FileError: They have several values.
    """
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{value} by {shown(pattern)}" for pattern, value in sorted(found.items()))
        raise FileError(
            f"{file}: {field!r} has several values for {path!r}: {listed}. PEFT takes "
            "the first one, but it sorts the patterns when it saves, so the order is lost, and with it the scale. "
            "Leave one of them in the file"
        )
    return next(iter(found.values()), default)
