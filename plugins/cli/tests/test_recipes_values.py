"""JSON schema: which values it allows, and which schemas a plugin may declare."""

import datetime
import re
from typing import Any

import pytest
from hypothesis import given, strategies as st

from tunerkit_cli.recipes.schema import objection, problems

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KINDS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


@given(plain)
def test_an_empty_schema_allows_every_plain_value(value: object) -> None:
    """Law: what JSON can express is allowed where nothing is said."""
    assert list(problems(value, {})) == []


@given(plain, st.sampled_from(sorted(KINDS)))
def test_a_type_allows_its_values_alone(value: object, kind: str) -> None:
    """Law: a value conforms to a type if Python's type says so; only true and false are booleans, and nothing else."""
    fits = isinstance(value, KINDS[kind]) and isinstance(value, bool) == (kind == "boolean")
    assert (not list(problems(value, {"type": kind}))) == fits


@pytest.mark.parametrize(
    ("value", "fragment", "message"),
    [
        (3, {"type": "string"}, "a: expected text, got 3; put it in quotes"),
        ("x", {"type": ["number", "null"], "description": "A rate."}, "a: expected a number, got 'x'. A rate"),
        ("x", {"type": ["array", "object"]}, "a: expected a list or a mapping, got 'x'"),
        ("x", {"type": "null"}, "a: expected no value, got 'x'"),
        ("reed", {"enum": ["red", "blue"]}, "a: expected red or blue, got 'reed'; did you mean 'red'?"),
        (float("nan"), {"minimum": 1}, "a: expected at least 1, got nan"),
        ([1, "x"], {"items": {"type": "integer"}}, "a[1]: expected a whole number, got 'x'"),
        ({"b": 1}, {"additionalProperties": {"type": "string"}}, "a.b: expected text, got 1; put it in quotes"),
        ({"b": 1}, {"properties": {"b": {"type": "boolean"}}}, "a.b: expected true or false, got 1"),
        (
            {"nmae": 1},
            {"properties": {"name": {}}, "additionalProperties": False},
            "a: unknown key 'nmae'; did you mean 'name'?",
        ),
        (
            {"x": 1},
            {"properties": {"name": {}}, "additionalProperties": False, "description": "Acme."},
            "a: unknown key 'x'; the keys are name. Acme",
        ),
        ({"x": 1}, {"additionalProperties": False}, "a: unknown key 'x'; the keys are none"),
        (
            {"b": [datetime.date(2024, 1, 31)]},
            {},
            "a.b[0]: expected text, a whole number, a number, true or false, a list or a mapping, "
            "got the date 2024-01-31; put it in quotes",
        ),
    ],
)
def test_what_is_not_allowed_is_named(value: object, fragment: dict[str, Any], message: str) -> None:
    """The message has the place, what was got, what is allowed, and what to do."""
    assert list(problems(value, fragment, "a")) == [message]


def test_all_problems_of_a_value_are_named() -> None:
    """One line each, in the order of the value."""
    fragment = {"properties": {"a": {"type": "string"}, "b": {"minimum": 1}}, "additionalProperties": False}
    assert [line.partition(":")[0] for line in problems({"b": 0, "a": 1}, fragment)] == ["b", "a"]
    assert len(list(problems({"b": 0, "a": 1, "c": 2}, fragment))) == 3


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        ("text", "expected a mapping, got 'text'"),
        ({"descripton": "x"}, "unknown key 'descripton'; did you mean 'description'?"),
        ({"if": {}}, "unknown key 'if'; the keys are type, description, "),
        ({1: 2}, "unknown key '1'"),
        ({"type": "text"}, r"type\[0\]: expected string, integer, .* or null, got 'text'"),
        ({"type": []}, r"type: expected 1 or more values in the list, got \[\]"),
        ({"type": [["string"]]}, r"type\[0\]: expected text, got \['string'\]"),
        ({"type": 3}, "type: expected a list, got 3"),
        ({"enum": 3}, "enum: expected a list, got 3"),
        ({"minimum": "0"}, "minimum: expected a number, got '0'"),
        ({"properties": {"a": {"type": "text"}}}, r"properties.a.type\[0\]: expected string, .* got 'text'"),
        ({"properties": {"a": 3}}, "properties.a: expected a mapping, got 3"),
        ({"items": {"type": "text"}}, r"items.type\[0\]: expected string, .* got 'text'"),
        ({"additionalProperties": {"type": "text"}}, r"additionalProperties.type\[0\]: expected string, .* got 'text'"),
        ({"type": "integer", "default": "3"}, "default: expected a whole number, got '3'"),
        ({"default": {1, 2}}, "is not JSON: .*set"),
    ],
)
def test_a_malformed_schema_is_named(fragment: object, message: str) -> None:
    """A plugin's author reads which keyword is wrong."""
    assert re.search(message, str(objection(fragment)))


def test_a_schema_that_contains_itself_is_refused() -> None:
    """It has no JSON, and checking it would not end."""
    fragment: dict[str, Any] = {}
    fragment["items"] = fragment
    assert "is not JSON" in str(objection(fragment))


def test_the_supported_keywords_may_be_combined() -> None:
    """Nested schemas, also of a property named type, and booleans for further keys."""
    inner = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "examples": [[1]]}
    fragment = {"type": ["object", "null"], "properties": {"a": inner, "type": inner}, "default": {"type": [1]}}
    assert objection(fragment) is None
    assert objection({"enum": ["a", "b"], "default": "a", "minLength": 1, "additionalProperties": inner}) is None
