"""The law of each kind of field: a config carries it through a mapping, JSON, YAML and an adapter's file, strictly."""

import copy
import dataclasses
import datetime
import enum
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

import attrs
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import nn

import tunerkit
from tests.support.config_checks import Cosine, Kinds, KindsPlugin, Linear, Noted, Size, Unit, problems_of
from tunerkit.config import AdapterConfig, from_mapping, setting, unstructure
from tunerkit.errors import ConfigError
from tunerkit_testing.registering import registered

LINEAR = "Linear (a mapping of steps, unit)"
COSINE = "Cosine (a mapping of start, warm_up, share)"
ONE, PLAIN = {"steps": 1, "unit": "steps"}, {"type": "Cosine", "start": 1.0, "warm_up": None, "share": 0.5}
EITHER = "expected 'Linear' or 'Cosine', got"
# Of each field: a value, and how it is written.
CASES: dict[str, tuple[Any, Any]] = {
    "whole": (3, 3),
    "number": (0.25, 0.25),
    "switch": (True, True),
    "text": ("a", "a"),
    "perhaps": (4, 4),
    "choice": ("two", "two"),
    "unit": (Unit.SHARE, "share"),
    "size": (Size.BIG, 9),
    "folder": (Path("a/b.json"), "a/b.json"),
    "pair": ((2, Unit.SHARE), [2, "share"]),
    "several": ([0.5, 1.0], [0.5, 1.0]),
    "sizes": ({Size.BIG, Size.SMALL}, [1, 9]),
    "names": (frozenset({"v", "q"}), ["q", "v"]),
    "ranks": ({"q": 3}, {"q": 3}),
    "schedule": (Linear(5, Unit.SHARE), {"steps": 5, "unit": "share"}),
    "warm_up": (Linear(5), {"steps": 5, "unit": "steps"}),
    "shape": (Cosine(0.5, Linear(1)), {**PLAIN, "start": 0.5, "warm_up": ONE}),
    "ending": (Linear(7), {"type": "Linear", "steps": 7, "unit": "steps"}),
    "parts": ((Linear(1), Cosine()), [{"type": "Linear", **ONE}, PLAIN]),
    "stages": ({"q": Linear(1)}, {"q": ONE}),
    "noted": (Noted(["a"]), {"notes": ["a"]}),
}
# Of each field: three wrong values, with the problem of each; the path is that of the field if it is not said.
WRONG: list[tuple[str, Any, str]] = [
    ("whole", True, "expected int, got bool True"),
    ("whole", "3", "expected int, got str '3'"),
    ("whole", 0, "expected >= 1, got 0"),
    ("number", None, "expected float, got None"),
    ("number", "1e-3", "expected float, got str '1e-3' (YAML reads this as text: write 1.0e-3)"),
    ("number", float("nan"), "expected a finite float of 32 bits, got float nan"),
    ("switch", 1, "expected bool, got int 1"),
    ("switch", "yes", "expected bool, got str 'yes'"),
    ("switch", None, "expected bool, got None"),
    ("text", 1, "expected str, got int 1"),
    ("text", ["a"], "expected str, got list ['a']"),
    ("text", Unit.STEPS, "expected str, got Unit <Unit.STEPS: 'steps'>"),
    ("perhaps", 4.0, "expected int or None, got float 4.0"),
    ("perhaps", "", "expected int or None, got str ''"),
    ("perhaps", 2**64, f"expected an int of 64 bits, got int {2**64}"),
    ("choice", "tow", "expected 'one' or 'two', got str 'tow'; did you mean 'two'?"),
    ("choice", None, "expected 'one' or 'two', got None"),
    ("choice", ["two"], "expected 'one' or 'two', got list ['two']"),
    ("unit", "shares", "expected 'steps' or 'share', got str 'shares'; did you mean 'share'?"),
    ("unit", Size.BIG, "expected 'steps' or 'share', got Size <Size.BIG: 9>"),
    ("unit", 0, "expected 'steps' or 'share', got int 0"),
    ("size", True, "expected 1 or 9 or None, got bool True"),
    ("size", 9.0, "expected 1 or 9 or None, got float 9.0"),
    ("size", "BIG", "expected 1 or 9 or None, got str 'BIG'"),
    ("folder", 3, "expected Path or None, got int 3"),
    ("folder", b"a", "expected Path or None, got bytes b'a'"),
    ("folder", ["a"], "expected Path or None, got list ['a']"),
    ("pair", [2], "expected list of int and 'steps' or 'share', got 1 values"),
    ("pair", [2, "sharp"], "expected 'steps' or 'share', got str 'sharp'; did you mean 'share'? @ $.pair[1]"),
    ("pair", "2", "expected list of int and 'steps' or 'share', got str '2'"),
    ("several", "0.5", "expected list of float, got str '0.5'"),
    ("several", [0.5, True], "expected float, got bool True @ $.several[1]"),
    ("several", [0.5, -1.0], "expected >= 0, got -1.0 @ $.several[1]"),
    ("sizes", [1, 2], "expected 1 or 9, got int 2 @ $.sizes[1]"),
    ("sizes", [1, 1], "expected distinct values, got list [1, 1]"),
    ("sizes", {"1": 1}, "expected list of 1 or 9, got dict {'1': 1}"),
    ("names", "qv", "expected list of str, got str 'qv'"),
    ("names", ["q", 1], "expected str, got int 1 @ $.names[1]"),
    ("names", ["q", "q"], "expected distinct values, got list ['q', 'q']"),
    ("ranks", [["q", 3]], "expected mapping of str to int, got list [['q', 3]]"),
    ("ranks", {"q": "3"}, "expected int, got str '3' @ $.ranks['q']"),
    ("ranks", {3: 3}, "expected str, got int 3 @ $.ranks[3]"),
    ("schedule", 5, f"expected {LINEAR}, got int 5"),
    ("schedule", {"stpes": 5, "steps": 5}, "unknown key 'stpes'; did you mean 'steps'? @ $.schedule.stpes"),
    ("schedule", {"steps": 0}, "expected >= 1, got 0 @ $.schedule.steps"),
    ("warm_up", {}, "missing, and it has no default @ $.warm_up.steps"),
    ("warm_up", {"steps": True}, "expected int, got bool True @ $.warm_up.steps"),
    ("warm_up", Cosine(), f"expected {LINEAR} or None, got Cosine {Cosine()!r}"),
    ("shape", {"steps": 5}, "expected 'Linear' or 'Cosine', got None @ $.shape.type"),
    ("shape", {"type": "Cosin"}, f"{EITHER} str 'Cosin'; did you mean 'Cosine'? @ $.shape.type"),
    ("shape", {"type": "Cosine", "warm_up": {"steps": "2"}}, "expected int, got str '2' @ $.shape.warm_up.steps"),
    ("ending", "7", f"expected {LINEAR} or {COSINE} or float or None, got str '7'"),
    ("ending", {"type": "Linear"}, "missing, and it has no default @ $.ending.steps"),
    ("ending", {"type": "Cosine", "share": 1.0}, "'share' must be < 1: 1.0"),
    ("parts", [3], f"expected {LINEAR} or {COSINE}, got int 3 @ $.parts[0]"),
    ("parts", [{"type": "Linear", "steps": 1}, {"type": 3}], f"{EITHER} int 3 @ $.parts[1].type"),
    ("parts", [Linear(0)], "expected >= 1, got 0 @ $.parts[0].steps"),
    ("stages", {"q": {"steps": 1.5}}, "expected int, got float 1.5 @ $.stages['q'].steps"),
    ("stages", {"q": 1}, f"expected {LINEAR}, got int 1 @ $.stages['q']"),
    ("stages", {"q": {"steps": 1, "unit": None}}, "expected 'steps' or 'share', got None @ $.stages['q'].unit"),
    ("noted", {"notes": "a"}, "expected list of str, got str 'a' @ $.noted.notes"),
    ("noted", {"notes": [1]}, "expected str, got int 1 @ $.noted.notes[0]"),
    ("noted", ["a"], "expected Noted (a mapping of notes), got list ['a']"),
]


def test_every_field_has_a_case() -> None:
    """The tables above cover the whole config, with three wrong values each."""
    names = attrs.fields_dict(Kinds).keys() - attrs.fields_dict(AdapterConfig).keys()
    assert set(CASES) == names
    assert Counter(name for name, *_ in WRONG) == dict.fromkeys(names, 3)


@pytest.mark.parametrize(("name", "wrong", "problem"), WRONG, ids=[f"{name}={wrong!r}" for name, wrong, _ in WRONG])
def test_a_wrong_value_of_each_kind_is_named_with_its_path(name: str, wrong: Any, problem: str) -> None:
    """The same line from a mapping and from a call: what is allowed, what was passed, and where."""
    expected = [problem if " @ $" in problem else f"{problem} @ $.{name}"]
    assert problems_of(lambda: from_mapping(Kinds, {name: wrong})) == expected
    assert problems_of(lambda: Kinds(**{name: wrong})) == expected


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_field_is_carried_everywhere(name: str, tmp_path: Path) -> None:
    """A mapping, JSON, YAML and an adapter's file give back the same object."""
    value, plain = CASES[name]
    with registered(KindsPlugin()):
        config: Any = tunerkit.structure("toy-kinds", {name: plain})
        assert config == Kinds(**{name: value})
        assert (getattr(config, name), type(getattr(config, name))) == (value, type(value))
        assert tunerkit.unstructure(config)[name] == plain
        for text, read in ((json.dumps({name: plain}), json.loads), (yaml.safe_dump({name: plain}), yaml.safe_load)):
            assert tunerkit.structure("toy-kinds", read(text)) == config
        model = tunerkit.wrap(nn.Sequential(nn.Linear(4, 4)), "toy-kinds", {name: plain, "targets": "0"})
        with pytest.warns(tunerkit.TunerkitWarning, match="untrained"):
            path = tunerkit.save(model, tmp_path)
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["tunerkit"])["config"][name] == plain
        loaded = tunerkit.load(copy.deepcopy(tunerkit.unwrap(model)), tmp_path)
        assert tunerkit.tuner(loaded).config == attrs.evolve(config, targets="0")


def test_all_problems_inside_are_named_at_once() -> None:
    """Those of several fields, of one class and of several elements, each with its path."""
    wrong = {"schedule": {"steps": "5", "unit": 3, "x": 1}, "stages": {"q": {"steps": 0}, "v": {}}, "text": 3}
    assert problems_of(lambda: from_mapping(Kinds, wrong)) == [
        "expected str, got int 3 @ $.text",
        "unknown key 'x'; known keys: steps, unit @ $.schedule.x",
        "expected int, got str '5' @ $.schedule.steps",
        "expected 'steps' or 'share', got int 3 @ $.schedule.unit",
        "expected >= 1, got 0 @ $.stages['q'].steps",
        "missing, and it has no default @ $.stages['v'].steps",
    ]


def test_a_class_inside_may_check_its_fields_against_each_other() -> None:
    """It raises a `ConfigError` with paths of its own; each line gets the path to the class."""

    @attrs.frozen
    class Span:
        first: int = 0
        last: int = 0

        def __attrs_post_init__(self) -> None:
            if self.first > self.last:
                raise ConfigError([f"expected first <= last, got {self.first} > {self.last} @ $.first", "odd"])

    spans = attrs.field(type=list[Span])
    config: Any = attrs.make_class("Spans", {"spans": spans}, bases=(AdapterConfig,), frozen=True)
    assert problems_of(lambda: config([{"last": 1}, {"first": 2}])) == [
        "expected first <= last, got 2 > 0 @ $.spans[1].first",
        "odd @ $.spans[1]",
    ]


def test_configs_share_nothing_that_can_change() -> None:
    """Neither with the caller's object, nor with the default, nor with each other."""
    mine = Noted(["a"])
    one, other = Kinds(noted=mine), Kinds()
    mine.notes.append("b")
    one.several.append(1.0)
    one.ranks["q"] = 1
    assert one.noted == Noted(["a"])
    other.noted.notes.append("c")
    assert (Kinds().noted, Kinds().several, Kinds().ranks) == (Noted(), [], {})


def test_a_config_whose_fields_can_be_hashed_can_be_hashed() -> None:
    """Frozen classes, frozensets and tuples inside are as good as numbers."""

    @attrs.frozen
    class Hashed(AdapterConfig):
        schedule: Linear | Cosine | None = setting(None, doc="Frozen.")  # noqa: RUF009 (an attrs field)
        names: frozenset[Linear] = setting(frozenset(), doc="Frozen.")
        folder: Path = setting(Path("a"), doc="Frozen.")  # noqa: RUF009 (an attrs field)

    config = Hashed(Linear(1), frozenset({Linear(3), Linear(2)}))
    again = from_mapping(Hashed, unstructure(config))
    assert again == config
    assert hash(again) == hash(config)
    assert [each["steps"] for each in unstructure(config)["names"]] == [2, 3]


def test_a_set_is_written_in_one_order() -> None:
    """Numbers by their size and texts by their letters, so that equal configs give equal files."""

    @attrs.frozen
    class Unordered(AdapterConfig):
        values: frozenset[int | str | None] = setting(frozenset(), doc="A set.")

    assert unstructure(Unordered(frozenset({"b", 10, None, 9, "a"})))["values"] == [9, 10, "a", "b", None]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (tuple[float, ...] | tuple[float, float], (0.5, 1.0, 2.0)),
        (tuple[int, ...] | tuple[str, ...], ("a", "b")),
        (Mapping[str, Linear | Cosine] | str | None, {"q": Cosine(), "v": Linear(2)}),
        (list[Linear | Cosine] | float, [Linear(2), Cosine()]),
        (Size | Unit | None, Unit.STEPS),
        (Mapping[str, int] | dict[str, str], {"q": "v"}),
    ],
)
def test_a_union_is_written_as_the_member_that_its_value_is_of(annotation: Any, value: Any) -> None:
    """Also where several of its members are lists or mappings, and where their elements are of several classes."""
    config = made(annotation, value)
    assert from_mapping(type(config), json.loads(json.dumps(unstructure(config)))) == config


class Word(str, enum.Enum):  # noqa: UP042 (the older form is the harder one)
    """Choices that are texts, in the form of before Python 3.11."""

    DARK = "dark"


@attrs.frozen
class Derived:
    """A class with a field that is computed, and one that is private."""

    _rank: int = 2
    double: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "double", 2 * self._rank)


def made(annotation: Any, value: Any, **metadata: Any) -> Any:
    """A config with one field, and its value."""
    field = attrs.field(type=annotation, metadata=metadata)
    return attrs.make_class("Made", {"value": field}, bases=(AdapterConfig,), frozen=True)(value)


@pytest.mark.parametrize("annotation", [Word, list[Word], set[Word], dict[str, Word], tuple[Word, ...] | None])
def test_choices_that_are_texts_themselves_are_written_as_plain_text(annotation: Any) -> None:
    """YAML could not write the member, and JSON would not give it back."""
    given: Any = "dark" if annotation is Word else {"a": "dark"} if get_origin(annotation) is dict else ["dark"]
    config = made(annotation, given)
    plain = yaml.safe_load(yaml.safe_dump(unstructure(config)))
    assert plain["value"] == given
    assert from_mapping(type(config), plain) == config
    assert "Word.DARK" in repr(config)


def test_a_path_may_be_given_as_a_choice_that_is_a_text() -> None:
    """As its value, and not as its name."""
    assert made(Path, Word.DARK).value == Path("dark")


def test_computed_fields_inside_are_computed_again() -> None:
    """They are not written; a private field is written by its name."""
    config = made(Derived, Derived(3))
    assert unstructure(config)["value"] == {"_rank": 3}
    assert from_mapping(type(config), unstructure(config)).value.double == 6


def test_a_range_holds_in_sets_and_not_in_classes() -> None:
    """Every number of a collection is in the range of the field; a class has ranges of its own."""
    assert problems_of(lambda: made(frozenset[int], [3, 0], ge=1)) == ["expected >= 1, got 0 @ $.value[0]"]
    assert made(list[Linear], [Linear(2)], ge=5).value == [Linear(2)]


# Choices that are texts, as those of `Unit`, that JSON does not have, and that are no numbers of JSON.
Shade: Any = enum.Enum("Shade", {"DARK": "dark"})
Odd: Any = enum.Enum("Odd", {"PAIR": (1, 2)})
Endless: Any = enum.Enum("Endless", {"INF": float("inf")})


@attrs.frozen
class Tree:
    """A class that contains itself."""

    children: "tuple[Tree, ...]" = ()


# With the key that says the class, with a field that JSON does not have, and not an attrs class.
Typed: Any = attrs.make_class("Typed", {"type": attrs.field(type=str, default="")}, frozen=True)
Bytes: Any = attrs.make_class("Bytes", {"raw": attrs.field(type=bytes, default=b"")}, frozen=True)
Plain: Any = dataclasses.make_dataclass("Plain", [])
Twin: Any = attrs.make_class("Linear", {"steps": attrs.field(type=int, default=1)})


@pytest.mark.parametrize(
    "annotation",
    [
        *(list, set, frozenset, dict, tuple, Any, None, type, complex, datetime.date, torch.dtype, Callable[[], int]),
        *(int | bytes, Mapping[int, str], Literal[b"x"], Plain, Odd, Endless, Tree, tuple[set[Any], ...]),
        *(Mapping[int, Linear], dict[Unit, int], set[list[int]], set[tuple[Noted, ...]], AdapterConfig, Kinds),
        *(Path | str, Unit | str, Unit | Shade, Unit | Literal["x"], Size | int, Size | float, Linear | dict[str, int]),
        *(list[int] | tuple[int, ...], set[int] | list[int], tuple[Linear, ...] | tuple[Cosine, ...]),
        *(Linear | Twin, Linear | Typed, list[Linear | Twin], list[bytes | None]),
    ],
)
def test_what_json_cannot_hold_or_tell_apart_is_refused_when_the_class_is_made(annotation: Any) -> None:
    """The method's author gets the error at import, not a user when saving: which field it is, and what is allowed."""
    field = attrs.field(default=None, type=annotation)
    with pytest.raises(TypeError, match=r"^\w+\.\w+ is annotated .*, which a config does not support; use .* Enum, "):
        attrs.make_class("Wrong", {"value": field}, bases=(AdapterConfig,), frozen=True)


def test_a_field_inside_that_cannot_be_held_is_named_itself() -> None:
    """The class and the field that are wrong, wherever the class is used."""
    field = attrs.field(default=None, type=dict[str, tuple[Bytes | None, ...]])
    with pytest.raises(TypeError, match=r"^Bytes\.raw is annotated bytes, which a config does not support"):
        attrs.make_class("Outer", {"value": field}, bases=(AdapterConfig,), frozen=True)


def test_a_class_may_have_a_field_named_type_where_it_is_alone() -> None:
    """The key says a class only where there are several."""

    @attrs.frozen
    class Alone(AdapterConfig):
        value: Typed | None = setting(None, doc="A class.")  # noqa: RUF009 (an attrs field)

    assert from_mapping(Alone, {"value": {"type": "x"}}).value == Typed("x")
    assert unstructure(Alone(Typed("x")))["value"] == {"type": "x"}
