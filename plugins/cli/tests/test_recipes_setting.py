"""Values on the command line: where each goes, which one wins, and what a mistyped key says."""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given, strategies as st

import tunerkit
from tunerkit.plugin import AdapterConfig, setting
from tunerkit_cli.plugin_commands import Addition
from tunerkit_cli.recipes import reading, setting as setting_
from tunerkit_cli.recipes.reading import structure
from tunerkit_cli.recipes.setting import FLAGS, merge

TRAINER = {
    **{"learning_rate": "float", "num_train_epochs": "float", "seed": "int", "max_length": "int | None"},
    **{"optim_args": "str | None", "dropout": "float", "weight_decay": "float", "bf16": "bool"},
    "eval_strategy": "IntervalStrategy | str",
}
METHOD = ("target_rank", "dropout", "rank_pattern", "targets", "name")


@attrs.frozen
class MethodConfig(AdapterConfig):
    """The settings of a method."""

    target_rank: int | None = setting(None, doc="a rank", aka=("target_r",))
    dropout: float = setting(0.0, doc="a share")
    rank_pattern: Mapping[str, int] = setting(attrs.Factory(dict), doc="ranks")
    name: Literal["no", "all"] = setting("all", doc="a word")


FIELDS = {name: field for name, field in attrs.fields_dict(MethodConfig).items() if name in METHOD}


@pytest.fixture(autouse=True, scope="module")
def _names() -> Iterator[None]:
    """The trainer and the method of all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "additions", lambda: ())  # it reads what is installed each time
        patch.setattr(setting_, "argument_types", lambda task: TRAINER)
        patch.setattr(setting_, "_method_settings", lambda *_: FIELDS)
        yield


def applied(mapping: dict[str, Any], *settings: str) -> dict[str, Any]:
    return setting_.from_command_line(mapping, settings)


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ("learning_rate=1e-3", {"training": {"learning_rate": 0.001}}),
        ("training.learning_rate=2e-3", {"training": {"learning_rate": 0.002}}),
        ("target_rank=4", {"config": {"target_rank": 4}}),
        ("config.dropout=0.1", {"config": {"dropout": 0.1}}),
        ("training.dropout=0.1", {"training": {"dropout": 0.1}}),
        ("targets=[query, value]", {"config": {"targets": ["query", "value"]}}),
        ("config.rank_pattern.query=2", {"config": {"rank_pattern": {"query": 2}}}),
        ('config.rank_pattern={"a.b": 2}', {"config": {"rank_pattern": {"a.b": 2}}}),
        ("columns.text=sentence", {"columns": {"text": "sentence"}}),
        ("columns={text: sentence}", {"columns": {"text": "sentence"}}),
        ("task=regression", {"task": "regression"}),
        ("max_length=64", {"max_length": 64}),
        ("training.max_length=64", {"training": {"max_length": 64}}),
        ("baseline=true", {"baseline": True}),
        ("data=a=b.csv", {"data": "a=b.csv"}),
        ("out='7'", {"out": "7"}),
        ("target_rank=null", {"config": {"target_rank": None}}),
        (" seed = 3", {"training": {"seed": 3}}),
        ("eval_strategy=no", {"training": {"eval_strategy": "no"}}),
        ("training.eval_strategy=off", {"training": {"eval_strategy": "off"}}),
        ("bf16=no", {"training": {"bf16": False}}),
        ("baseline=yes", {"baseline": True}),
        ("columns.text=010", {"columns": {"text": "010"}}),
        ("columns={text: no, label: 1:30}", {"columns": {"text": "no", "label": "1:30"}}),
        ("out=2024", {"out": "2024"}),
        ("data=[on, 2024-01-31]", {"data": ["on", "2024-01-31"]}),
        ("name=no", {"config": {"name": "no"}}),
        ("model=null", {"model": None}),
    ],
)
def test_a_setting_goes_where_its_key_belongs(setting: str, changed: dict[str, Any]) -> None:
    """With its section, or by a bare name that only one section has; a recipe's own key is never ambiguous."""
    assert applied({}, setting) == changed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "dropout=0.1",
            "--set dropout: the trainer and the method both have 'dropout'; write training.dropout or config.d",
        ),
        ("lerning_rate=1", r"--set lerning_rate: there is no key 'lerning_rate'; did you mean 'learning_rate'\?"),
        ("modle=x", r"--set modle: there is no key 'modle'; did you mean 'model'\?"),
        ("target_rnk=3", "did you mean 'target_rank'"),
        (
            "training.target_rank=3",
            "--set training.target_rank: there is no key 'target_rank' in 'training'; did you mean 'config.t",
        ),
        ("training.sede=3", "there is no key 'sede' in 'training'; did you mean 'seed'"),
        ("config.target_rnk=3", "there is no key 'target_rnk' in 'config'; did you mean 'target_rank'"),
        (
            "target_modules=[q]",
            r"--set target_modules: there is no key .*did you mean 'config.targets'\?",
        ),
        ("lora_alpha=16", r"there is no key 'lora_alpha'; `tunerkit schema`"),
        ("config.target_r=3", r"there is no key 'target_r' in 'config'; did you mean 'target_rank'\?"),
        ("use_dora=true", "there is no key 'use_dora'; use method 'dora'"),
        ("trainig.seed=3", "there is no key 'trainig'; did you mean 'training'"),
        ("lr=3", r"there is no key 'lr'; did you mean 'training.learning_rate'\?"),
        ("epochs=3", r"there is no key 'epochs'; did you mean 'training.num_train_epochs'\?"),
        ("zzz=3", "there is no key 'zzz'; `tunerkit schema` lists a recipe's keys, `tunerkit config` a method's"),
        ("extra.a=3", "there is no key 'extra'"),
        ("learning_rate", "--set 'learning_rate': expected key=value, as in --set learning_rate=1e-3"),
        ("", "--set '': expected key=value"),
        ("=3", "--set '=3': expected key=value"),
        ("a..b=3", r"--set 'a\.\.b=3': expected key=value"),
        (".seed=3", "expected key=value"),
        ("seed.=3", "expected key=value"),
        ("a." * 20 + "b=3", "expected key=value"),
        ("seed=", "expected key=value, .* write seed=null for no value"),
        ("seed= ", "write seed=null for no value"),
        ("seed=#3", "write seed=null for no value, or put the value in quotes"),
        ("targets=[a", "--set targets: cannot be read as .yaml"),
        ("seed=010", "line 1: 010 is octal in YAML 1.1 and decimal in YAML 1.2; write the decimal number"),
        ("data=@a", "--set data: cannot be read as .yaml: .*; if it is text, put it in quotes"),
        ("seed.x=3", "there is no key 'seed'; did you mean 'training.seed'"),
        ("config.zzz=3", "there is no key 'zzz' in 'config'; `tunerkit schema` lists"),
        ("columns.seed.x=3", "columns.seed is 'b', which has no keys"),
        ("config={a: 1, a: 2}", "given twice: a"),
        ("targets=" + "[" * 20 + "]" * 20, "deeper than 10 levels"),
        ("data=" + "x" * 200_000, "has 200000 characters; use at most 100000"),
        ("k" * 10_000 + "=1", "there is no key"),
        ("task.name=x", "--set task.name: task is 'seq2seq', which has no keys; set task itself"),
        ("training.optim_args.a=x", "training.optim_args is 'b', which has no keys; set training.optim_args itself"),
    ],
)
def test_a_mistake_is_one_line(setting: str, message: str) -> None:
    """It names the setting, and what is expected or the closest key."""
    with pytest.raises(tunerkit.errors.ConfigError, match=message) as caught:
        applied({"task": "seq2seq", "training": {"optim_args": "b"}, "columns": {"seed": "b"}}, setting)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_all_mistakes_are_in_one_error() -> None:
    """Also those of one command line."""
    with pytest.raises(tunerkit.errors.ConfigError) as caught:
        applied({}, "seed", "modle=x", "seed=3", "dropout=1")
    assert len(caught.value.problems) == 3


plain = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("abc é'#:-", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
    max_leaves=5,
)
changes = st.lists(st.tuples(st.sampled_from([*sorted({*TRAINER} - {"dropout"}), *METHOD[2:]]), plain), max_size=5)


@given(changes)
def test_the_last_value_of_a_key_stands(changes: list[tuple[str, Any]]) -> None:
    """Law: the result is that of setting the values one after another, and the input does not change."""
    before: dict[str, Any] = {"training": {"seed": [1]}, "config": {"targets": {"a": 1}}}
    given_ = copy.deepcopy(before)
    after = applied(given_, *(f"{key}={json.dumps(value)}" for key, value in changes))
    assert given_ == before
    last = dict(changes)
    expected = copy.deepcopy(before)
    for key, value in last.items():
        section = None if key == "max_length" else "config" if key in METHOD else "training"
        is_word = key in ("optim_args", "eval_strategy", "name", "targets") and isinstance(value, bool | int | float)
        (expected if section is None else expected[section])[key] = json.dumps(value) if is_word else value
    assert after == expected


def test_a_later_setting_changes_a_part_of_an_earlier_one() -> None:
    """A whole section first, then one of its keys; the result shares nothing with the input."""
    before = {"config": {"targets": ["a"]}}
    assert applied(before, "config={rank_pattern: {a: 1}}", "config.rank_pattern.b=2") == {
        "config": {"rank_pattern": {"a": 1, "b": 2}}
    }
    after = applied(before)
    after["config"]["targets"].append("b")
    assert before == {"config": {"targets": ["a"]}}


def test_one_place_of_a_shared_mapping_changes_alone() -> None:
    """A YAML alias puts the same mapping into two places."""
    shared = {"dropout": 0.1}
    assert applied({"training": shared, "config": shared}, "config.dropout=0.2") == {
        **{"training": {"dropout": 0.1}, "config": {"dropout": 0.2}}
    }
    assert shared == {"dropout": 0.1}


keys = st.sampled_from([*sorted(TRAINER), *METHOD, *FLAGS, "training", "config", "columns"]) | st.text(max_size=4)


@given(st.lists(keys, max_size=3), st.text(max_size=8))
def test_any_text_is_a_setting_or_an_error_of_ours(path: list[str], text: str) -> None:
    """Law: nothing but a `ConfigError` is raised, whatever is typed."""
    with contextlib.suppress(tunerkit.errors.ConfigError):
        assert isinstance(applied({"training": {"seed": 1}, "columns": None}, f"{'.'.join(path)}={text}"), dict)


def test_keys_of_plugins_are_set_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are keys of the recipe like any other."""
    keys = {"acme": {"type": "object", "description": "Acme's options."}}
    monkeypatch.setattr(reading, "additions", lambda: (Addition("acme", recipe_keys=keys),))
    assert applied({}, "acme.level=3") == {"acme": {"level": 3}}
    with pytest.raises(tunerkit.errors.ConfigError, match="there is no key 'acmee'; did you mean 'acme'"):
        applied({}, "acmee.level=3")


def test_flags_set_the_same_keys_as_a_recipe(tmp_path: Path) -> None:
    """Every flag has its key."""
    flags = {
        **{"task": "regression", "method": "lora", "model": "m", "data": "d.csv", "eval_data": "e.csv"},
        **{"config": "{rank: 2}", "out": "o", "epochs": 2, "lr": 0.1, "batch_size": 4, "seed": 0},
        **{
            "max_length": 8,
            "precision": "bf16",
            "baseline": False,
            "text_column": "sentence",
            "label_column": "class",
            "from": "f",
        },
    }
    assert set(flags) == set(FLAGS)
    merged = merge({"baseline": True, "training": {"seed": 1, "weight_decay": 0.1}, "config": {"alpha": 1}}, flags)
    assert merged == {
        **{"task": "regression", "method": "lora", "model": "m", "data": "d.csv", "eval_data": "e.csv", "out": "o"},
        **{"config": {"rank": 2}, "max_length": 8, "precision": "bf16", "baseline": False, "from_adapter": "f"},
        "columns": {"text": "sentence", "label": "class"},
        "training": {
            **{"num_train_epochs": 2, "learning_rate": 0.1, "per_device_train_batch_size": 4, "seed": 0},
            "weight_decay": 0.1,
        },
    }
    assert structure(merged).training == merged["training"]
    (tmp_path / "c.yaml").write_text("rank: 3\n")
    assert merge({}, {"config": str(tmp_path / "c.yaml")}) == {"config": {"rank": 3}}


def test_the_command_line_wins_over_the_recipe_and_set_over_flags() -> None:
    """Recipe, then flags, then ``--set``."""
    recipe = {"training": {"learning_rate": 1, "seed": 1, "num_train_epochs": 1}}
    flagged = merge(recipe, {"lr": 2, "seed": 2})
    assert applied(flagged, "seed=3") == {"training": {"learning_rate": 2, "seed": 3, "num_train_epochs": 1}}
    assert recipe == {"training": {"learning_rate": 1, "seed": 1, "num_train_epochs": 1}}


@pytest.mark.parametrize(
    ("mapping", "flags", "message"),
    [
        ({"training": 3}, {"lr": 0.1}, "--lr: training is 3, which has no keys; set training itself"),
        ({"training": "x"}, {"batch_size": 1}, "--batch-size: training is 'x', which has no keys"),
        ({}, {"config": "gone.yaml"}, "gone.yaml: no such file"),
        ({}, {"config": "gone.txt"}, "settings files end in .yaml"),
        ({}, {"config": "{rank"}, "--config: cannot be read"),
    ],
)
def test_a_flag_that_cannot_be_set_is_named(mapping: dict[str, Any], flags: dict[str, Any], message: str) -> None:
    """By the name that the user typed."""
    with pytest.raises(tunerkit.errors.ConfigError, match=message):
        merge(mapping, flags)
