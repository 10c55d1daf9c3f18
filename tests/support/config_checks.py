"""Checks of a method's config: JSON and back, and the errors for bad input; and a config with every kind of field."""

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from torch import nn

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import AdapterConfig, BaseLayer, Method, setting
from tunerkit_testing.checks.configs import assert_survives_json
from tunerkit_testing.toy_adapters import LowRank
from tunerkit_testing.toy_methods import LowRankPlugin

check_survives_json = assert_survives_json


def problems_of(build: Callable[[], object]) -> list[str]:
    """The lines of the error that ``build`` raises."""
    with pytest.raises(tunerkit.errors.ConfigError) as caught:
        build()
    return list(caught.value.problems)


def mistakes(method: str, mapping: Mapping[str, Any]) -> list[str]:
    """The lines of the error that ``mapping`` is rejected with, one for each mistake."""
    with pytest.raises(tunerkit.errors.ConfigError) as caught:
        tunerkit.structure(method, mapping)
    return [line.removeprefix("- ") for line in str(caught.value).splitlines() if "@ $" in line]


def check_one_mistake(method: str, mapping: Mapping[str, Any], words: Sequence[str]) -> None:
    """``mapping`` is rejected for one mistake, in a line that has all of ``words``."""
    (line,) = mistakes(method, mapping)
    assert all(word in line for word in words), line


def check_unmatched_pattern(method: str, field: str, value: object) -> None:
    """A pattern in ``field`` that matches no target is an error with the closest name; the model is unchanged."""
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    before = list(model.state_dict())
    with pytest.raises(tunerkit.errors.ConfigError, match=rf"'qury' matches none.*query.*@ \$\.{re.escape(field)}"):
        tunerkit.wrap(model, method, {"targets": ["query", "value"], field: {"qury": value}})
    assert list(model.state_dict()) == before


class Unit(enum.Enum):
    """Choices that are written as text."""

    STEPS = "steps"
    SHARE = "share"


class Size(enum.IntEnum):
    """Choices that are numbers."""

    SMALL = 1
    BIG = 9


@attrs.frozen
class Linear:
    """A schedule: a class inside a config."""

    steps: int = setting(doc="How long it takes.", ge=1)
    unit: Unit = setting(Unit.STEPS, doc="What the steps are.")


@attrs.frozen
class Cosine:
    """Another one, with a class inside and a check of its own."""

    start: float = attrs.field(default=1.0)
    warm_up: Linear | None = None
    share: float = attrs.field(default=0.5, validator=attrs.validators.lt(1))


@attrs.define
class Noted:
    """A class that can be changed, and holds what can be changed."""

    notes: list[str] = attrs.field(factory=list)


@attrs.frozen
class Kinds(AdapterConfig):
    """A field of each kind that a config carries."""

    whole: int = setting(2, ge=1, doc="An int.")
    number: float = setting(0.5, doc="A float.")
    switch: bool = setting(False, doc="A bool.")
    text: str = setting("", doc="A text.")
    perhaps: int | None = setting(None, doc="An int, or none.")
    choice: Literal["one", "two"] = setting("one", doc="A choice.")
    unit: Unit = setting(Unit.STEPS, doc="A member of an Enum.")
    size: Size | None = setting(None, doc="A member of an IntEnum, or none.")
    folder: Path | None = setting(None, doc="A path, or none.")
    pair: tuple[int, Unit] = setting((1, Unit.STEPS), doc="A pair.")
    several: list[float] = setting([], ge=0, doc="A list.")
    sizes: set[Size] = setting(attrs.Factory(set), doc="A set.")
    names: frozenset[str] = setting(frozenset(), doc="A set that cannot change.")
    ranks: dict[str, int] = setting({}, doc="A mapping.")
    schedule: Linear = setting(Linear(3), doc="A class.")
    warm_up: Linear | None = setting(None, doc="A class, or none.")
    shape: Linear | Cosine = setting(Linear(1), doc="One of two classes.")
    ending: Linear | Cosine | float | None = setting(None, doc="One of two classes, a number, or none.")
    parts: tuple[Linear | Cosine, ...] | str = setting((), doc="Objects of two classes, or a text.")
    stages: dict[str, Linear] = setting({}, doc="An object for each name.")
    noted: Noted = setting(Noted(), doc="A class that can be changed.")


class KindsPlugin(OneMethod, LowRankPlugin):
    """``toy-kinds``: a method that has them."""

    method = Method("toy-kinds", config=Kinds)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: Any) -> LowRank:
        return LowRank(base, config.whole)
