"""Single values of the settings, checked: what is wrong is collected, so that an error names all of it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import attrs

from tunerkit.errors import shown

Value = TypeVar("Value")
HIGHEST_RANK: Final = 1_000_000
_HIGHEST: Final = 10**12
_LARGEST: Final = 1e12  # of the numbers that multiply weights: products stay in the range of fp32


def is_rank(value: object) -> bool:
    """Whether a value is a rank that PEFT's LoRA may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= HIGHEST_RANK


def is_number(value: object) -> bool:
    """Whether a value is a number that can multiply weights."""
    # False for NaN as well.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


@attrs.define
class Values:
    """The values of a JSON object.

    Attributes:
        found: The object.
        problems: What is wrong with the values that were read, one line each.
    """

    found: Mapping[str, Any]
    problems: list[str] = attrs.field(factory=list)

    def integer(self, name: str, default: int, *, least: int = 0, most: int = _HIGHEST) -> int:
        """Read an integer. An absent value or null is the default, here and below."""
        value = self._given(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        return self._wrong(name, value, f"an integer from {least} to {most}", default)

    def number(self, name: str, default: float, *, least: float = -math.inf, below: float = math.inf) -> float:
        """Read a number."""
        value = self._given(name, default)
        if is_number(value) and least <= value < below:
            return float(value)
        limits = (f" from {least:g}" if least > -math.inf else "") + (
            f" and below {below:g}" if below < math.inf else ""
        )
        return self._wrong(name, value, f"a number{limits}, at most {_LARGEST:g}", default)

    def flag(self, name: str) -> bool:
        """Read true or false."""
        value = self._given(name, False)
        return value if isinstance(value, bool) else self._wrong(name, value, "true or false", False)

    def text(self, name: str) -> str:
        """Read a text."""
        value = self._given(name, "")
        return value if isinstance(value, str) else self._wrong(name, value, "a text", "")

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Read one of some words."""
        value = self._given(name, allowed[0])
        if isinstance(value, str) and value in allowed:
            return value
        return self._wrong(name, value, " or ".join(map(repr, allowed)), allowed[0])

    def names(self, name: str) -> tuple[str, ...]:
        """Read a list of names."""
        value = self._given(name, [])
        if isinstance(value, list) and all(isinstance(each, str) and each for each in value):
            return tuple(value)
        return self._wrong(name, value, "a list of names", ())

    def places(self, name: str) -> bool:
        """Whether a value is a list of names of modules, or an expression for their paths."""
        value = self._given(name, [])
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            return True
        return self._wrong(name, value, "a list of names, or a regular expression", False)

    def table(self, name: str, is_valid: Callable[[object], bool], expected: str) -> dict[str, Any]:
        """Read numbers by name."""
        value = self._given(name, {})
        if not isinstance(value, dict):
            return self._wrong(name, value, "an object that maps patterns to numbers", {})
        wrong = {key: each for key, each in value.items() if not is_valid(each)}
        for key, each in wrong.items():
            self._wrong(f"{name}.{key}", each, expected, None)
        return {key: each for key, each in value.items() if key not in wrong}

    def ids(self, name: str) -> dict[str, tuple[int, ...]]:
        """Read ids by the name of a module; those of no module have an empty name."""
        value = self._given(name, {})
        table = {"": value} if isinstance(value, list) else value
        if not isinstance(table, dict) or not all(map(_are_ids, table.values())):
            return self._wrong(name, value, "a list of ids, or an object that maps names of modules to such lists", {})
        return {key: tuple(each) for key, each in table.items() if each}

    def masks(self, name: str) -> dict[str, int] | None:
        """Read how many values are true, by name; None for null."""
        value = self._given(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            return self._wrong(name, value, "null, or an object that maps names to lists of true and false", None)
        wrong = [key for key, mask in value.items() if not _is_mask(mask)]
        for key in wrong:
            self._wrong(f"{name}.{key}", value[key], "a list of true and false, one for each triplet", None)
        return {key: sum(map(bool, mask)) for key, mask in value.items() if key not in wrong}

    def _given(self, name: str, default: Any) -> Any:
        value = self.found.get(name)
        return default if value is None else value

    def _wrong(self, name: str, value: object, expected: str, instead: Value) -> Value:
        self.problems.append(f"{name!r} is {shown(value)}; expected {expected}")
        return instead


def _are_ids(ids: object) -> bool:
    return isinstance(ids, list) and all(type(each) is int and 0 <= each <= _HIGHEST for each in ids)


def _is_mask(mask: object) -> bool:
    return isinstance(mask, list) and all(isinstance(each, bool) or each in (0, 1) for each in mask)
