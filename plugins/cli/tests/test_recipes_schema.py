"""The JSON schema of recipes: complete, in the standard's form, and true of what is read."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from hypothesis import given, strategies as st
from typer.testing import CliRunner

import tunerkit
from tests.support.config_checks import Kinds, KindsPlugin
from tunerkit_cli import app, settings
from tunerkit_cli.plugin_commands import Addition
from tunerkit_cli.recipes import reading
from tunerkit_cli.recipes.reading import schema, structure
from tunerkit_cli.recipes.recipe import TASKS, Recipe
from tunerkit_cli.recipes.schema import settings_schema
from tunerkit_cli.recipes.writing import starter
from tunerkit_testing.registering import registered
from tunerkit_testing.strategies import configs_of

ACME: dict[str, Any] = {
    "acme": {"type": "object", "description": "Acme's options."},
    "colour": {"enum": ["red", "green"], "description": "A colour.", "default": "red"},
}


@pytest.fixture(autouse=True, scope="module")
def _no_plugins() -> Iterator[None]:
    """Reading what is installed takes a moment, and the schema is asked for hundreds of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "additions", lambda: ())
        yield


@pytest.fixture(scope="module")
def valid(_no_plugins: None) -> Callable[[Any], bool]:
    """Whether a value conforms to the schema, by the standard."""
    jsonschema = pytest.importorskip("jsonschema")
    is_valid: Callable[[Any], bool] = jsonschema.Draft202012Validator(schema()).is_valid
    return is_valid


@pytest.mark.parametrize("task", TASKS)
def test_every_starter_conforms(task: str, valid: Callable[[Any], bool]) -> None:
    """An editor marks nothing in a recipe to start from."""
    assert valid(settings.given_value(starter(task), "starter"))


def test_every_key_is_described() -> None:
    """The fields of `Recipe`, and no other, with a description and the default of the field."""
    properties = schema()["properties"]
    assert list(properties) == [field.name for field in attrs.fields(Recipe) if field.name != "extra"]
    assert all(fragment["description"].endswith(".") for fragment in properties.values())
    defaults = {name: fragment.get("default") for name, fragment in properties.items()}
    assert {**defaults, "extra": {}} == attrs.asdict(Recipe())
    assert properties["task"]["enum"] == [*TASKS, None]
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["additionalProperties"] is False


KEYS = [*(field.name for field in attrs.fields(Recipe)), "modle"]
values = (
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.just(2**31)
    | st.floats(-1, 1).filter(lambda number: not number.is_integer())  # 1.0 is a whole number there
    | st.sampled_from(["", "x", *TASKS])
) | st.dictionaries(st.sampled_from("ab"), st.integers() | st.text(max_size=1), max_size=2)


@given(mapping=st.dictionaries(st.sampled_from(KEYS), values, max_size=3))
def test_what_conforms_is_read_and_nothing_else(valid: Callable[[Any], bool], mapping: dict[str, Any]) -> None:
    """Law: the schema and the reader agree about every mapping."""
    try:
        structure(mapping)
    except tunerkit.errors.ConfigError:
        assert not valid(mapping)
    else:
        assert valid(mapping)


def test_keys_of_plugins_are_in_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """As their plugin declares them, and like core's they may be left without a value."""
    monkeypatch.setattr(reading, "additions", lambda: (Addition("acme", recipe_keys=ACME),))
    properties = schema()["properties"]
    assert properties["acme"] == {"type": ["object", "null"], "description": "Acme's options."}
    assert properties["colour"] == {"enum": ["red", "green", None], "description": "A colour.", "default": "red"}
    assert ACME["colour"]["enum"] == ["red", "green"]
    assert structure({"acme": None, "colour": None}).extra == {"colour": "red"}


def test_the_command_prints_the_schema() -> None:
    """As JSON, which a file and an editor take."""
    told = CliRunner().invoke(app.build(), ["schema"])
    assert told.exit_code == 0
    assert json.loads(told.stdout) == json.loads(json.dumps(schema()))


def test_settings_conform_to_the_settings_schema_their_method() -> None:
    """Law: what a config holds, of every kind of field, is what the schema allows."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(settings_schema(Kinds))

    @given(configs_of(Kinds))
    def check(config: Kinds) -> None:
        validator.validate(tunerkit.unstructure(config))

    check()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"whole": "3"}, {"whole": 0}, {"number": None}, {"choice": "three"}, {"unit": "shares"}, {"size": 2}),
        *({"folder": 3}, {"pair": [1]}, {"pair": [1, "x"]}, {"several": [-1.0]}, {"sizes": [9, 9]}, {"names": "qv"}),
        *({"ranks": {"q": "3"}}, {"schedule": {}}, {"schedule": {"stpes": 1, "steps": 1}}, {"warm_up": {"steps": 0}}),
        *({"shape": {"steps": 5}}, {"ending": {"type": "Cosin"}}, {"parts": [3]}, {"stages": {"q": 1}}, {"x": 1}),
    ],
    ids=str,
)
def test_the_schema_marks_wrong_settings(wrong: dict[str, Any]) -> None:
    """Law: what it does not allow is refused, too."""
    jsonschema = pytest.importorskip("jsonschema")
    assert not jsonschema.Draft202012Validator(settings_schema(Kinds)).is_valid(wrong)
    with registered(KindsPlugin()), pytest.raises(tunerkit.errors.ConfigError):
        tunerkit.structure("toy-kinds", wrong)


def test_the_command_prints_the_settings_of_a_method() -> None:
    """Under ``config`` of a recipe, with descriptions, defaults and ranges; the rest stays."""
    with registered(KindsPlugin()):
        printed = CliRunner().invoke(app.build(), ["schema", "toy-kinds"])
    found = json.loads(printed.stdout)
    own = found["properties"].pop("config")
    assert {**found["properties"], "config": schema()["properties"]["config"]} == schema()["properties"]
    assert own["type"] == ["object", "null"]
    assert own["properties"]["whole"] == {"type": "integer", "minimum": 1, "description": "An int.", "default": 2}
    assert own["properties"]["unit"]["enum"] == ["steps", "share"]
    assert own["properties"]["shape"]["default"] == {"type": "Linear", "steps": 1, "unit": "steps"}
    assert own["properties"]["shape"]["anyOf"][1]["properties"]["type"] == {"const": "Cosine"}


def test_the_settings_of_an_unknown_method_are_an_error_with_the_closest_name() -> None:
    """As everywhere else."""
    printed = CliRunner().invoke(app.build(), ["schema", "adalor"])
    assert printed.exit_code == 2
    assert "did you mean 'adalora'" in printed.output
