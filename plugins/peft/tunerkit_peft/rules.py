"""PEFT's rules for the rank and the alpha of a module, from patterns whose order its JSON has lost."""

import re
from collections.abc import Callable, Iterable, Mapping
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
    ranks = _compiled(settings, "rank_pattern", settings.ranks)
    alphas = _compiled(settings, "alpha_pattern", settings.alphas)
    return {path: _rule(settings, path, ranks, alphas) for path in paths}


Pattern = tuple[str, Callable[[str], object], Value]


def _compiled(settings: Settings, field: str, table: Mapping[str, Value]) -> list[Pattern[Value]]:
    r"""Match as PEFT does: ``(.*\.)?(PATTERN)`` from the start to the end of a path."""
    whole = {pattern: rf"(.*\.)?({pattern})" for pattern in table}
    simple = {text: re.compile(text) for pattern, text in whole.items() if _SIMPLE.fullmatch(pattern)}
    try:
        others = file_matchers(text for text in whole.values() if text not in simple)
    except TargetError as error:
        raise _bad_pattern(settings, field, error) from error
    return [(pattern, others.get(text) or simple[text].fullmatch, table[pattern]) for pattern, text in whole.items()]


def _rule(settings: Settings, path: str, ranks: list[Pattern[int]], alphas: list[Pattern[float]]) -> Rule:
    matched = _matching(settings, "rank_pattern", ranks, path)
    scaled = _matching(settings, "alpha_pattern", alphas, path)
    if len(set(scaled.values())) > 1:
        raise FileError(
            f"{settings.common.file}: 'alpha_pattern' has several values for {path!r}: {_listed(scaled)}. PEFT takes "
            "the first one, but it sorts the patterns when it saves, so the order is lost, and with it the scale. "
            "Leave one of them in the file"
        )
    allowed = frozenset(matched.values()) or frozenset({settings.rank})
    return Rule(allowed, next(iter(scaled.values()), settings.alpha))


def _matching(settings: Settings, field: str, patterns: list[Pattern[Value]], path: str) -> dict[str, Value]:
    found = {}
    for pattern, matches, value in patterns:
        try:
            if matches(path):
                found[pattern] = value
        except TargetError as error:
            raise _bad_pattern(settings, field, error) from error
    return found


def _bad_pattern(settings: Settings, field: str, error: TargetError) -> FileError:
    return FileError(
        f"{settings.common.file}: {field!r} has a pattern that cannot be used: {error}. Replace it with "
        "the names of the modules"
    )


def _listed(found: Mapping[str, object]) -> str:
    return ", ".join(f"{value} by {shown(pattern)}" for pattern, value in sorted(found.items()))
