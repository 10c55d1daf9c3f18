"""Reading recipes: strictly, with all mistakes in one error."""

import re
from pathlib import Path
from typing import Any

import attrs
import pytest

import tunerkit
from tunerkit_cli.plugin_commands import Addition
from tunerkit_cli.recipes import reading
from tunerkit_cli.recipes.reading import read_recipe, structure
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.recipes.setting import FLAGS
from tunerkit_cli.recipes.trainer_arguments import argument_types
from tunerkit_lora import LoraConfig

DOCS = Path(__file__).parents[3] / "docs"
ACME = {"acme": {"type": "object", "description": "Acme's options.", "additionalProperties": {"type": "integer"}}}


def read(text: str, folder: Path, name: str = "r.yaml") -> Recipe:
    (folder / name).write_text(text, encoding="utf-8")
    return read_recipe(folder / name)


FULL = """
version: 1
task: regression
model: some/model
data: d.csv
eval_data: e.csv
method: lora
config: {rank: 4, alpha_pattern: {a.b: 2}}
training: {learning_rate: 2e-3, logging_steps: null, optim_args: [1, x]}
columns: {text: sentence}
max_length: 64
baseline: true
out: there
"""


def test_every_key_arrives_in_its_field(tmp_path: Path) -> None:
    """Values keep their types; 2e-3 is a number."""
    assert read(FULL, tmp_path) == Recipe(
        version=1,
        task="regression",
        model="some/model",
        data="d.csv",
        eval_data="e.csv",
        method="lora",
        config={"rank": 4, "alpha_pattern": {"a.b": 2}},
        training={"learning_rate": 0.002, "logging_steps": None, "optim_args": [1, "x"]},
        columns={"text": "sentence"},
        max_length=64,
        baseline=True,
        out="there",
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "version: 1\n", "training:\nconfig:\nversion:\ntask:\nout:\n"])
def test_a_key_that_is_left_out_or_empty_has_its_default(text: str, tmp_path: Path) -> None:
    """A section whose lines are all commented out is empty, and no mistake."""
    assert read(text, tmp_path) == Recipe()


def test_json_is_read_too(tmp_path: Path) -> None:
    """The ending decides, as with settings."""
    assert read('{"task": "seq2seq", "training": {"seed": 1}}', tmp_path, "r.json") == Recipe(
        task="seq2seq", training={"seed": 1}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x\n", r"r\.yaml: unknown key 'modle'; did you mean 'model'\?"),
        ("zzz: 1\n", "unknown key 'zzz'; the keys are version, task, .*out. .*trainer.*`training`"),
        ("learning_rate: 1\n", r"unknown key 'learning_rate'; did you mean 'training\.learning_rate'\?"),
        ("load_in_4bit: true\n", r"unknown key 'load_in_4bit'; did you mean 'quantisation: nf4'\?"),
        ("extra: {}\n", "unknown key 'extra'"),
        ("acme: {}\n", "unknown key 'acme'"),
        ("task: text-clasification\n", "task: expected .* did you mean 'text-classification'"),
        ("task: chess\n", "task: expected text-classification, regression, .* or embedding, got 'chess'"),
        ("task: [regression]\n", "task: expected text, got .* The task"),
        ("model: ''\n", "model: expected 1 or more characters, got ''"),
        ("data: {train: a.csv}\n", "data: unknown key 'train'; the keys are path, name, split, .*. The training data"),
        (
            "data: [{path: a.csv, weight: 1}, b.csv]\n",
            "data: b.csv has no weight, and others have one; give",
        ),
        ("data: [{path: a.csv, weight: 0}, b.csv]\n", r"data\[0\].weight: expected more than 0, got 0"),
        ("data: {path: org/name, rows: 0}\n", "data.rows: expected at least 1, got 0"),
        (
            "data: {path: org/name, streaming: true}\n",
            "data: unknown key 'streaming'; .* with `rows: 1000` for a stream",
        ),
        ("streaming: true\n", "unknown key 'streaming'; did you mean 'data: {path: org/name, rows: 1000}'"),
        ("data: {split: test}\n", "data: there is no 'path'. A file, a folder of images, or the name of a data set"),
        ("data: [a.csv, '']\n", r"data\[1\]: expected 1 or more characters, got ''"),
        ("data: []\n", r"data: expected 1 or more values in the list, got \[\]"),
        ("baseline: 010\n", "010 is octal in YAML 1.1 and decimal in YAML 1.2"),
        ("method: {lora: 1}\n", "method: expected text, got .*`tunerkit methods`"),
        ("config: adalora.yaml\n", "config: expected a mapping, got 'adalora.yaml'. .* A file goes with --config"),
        ("config: {1: 2}\n", "config: expected text as a key, got 1; put it in quotes"),
        ("training: [a]\n", r"training: expected a mapping, got \['a'\]. Arguments of the trainer"),
        ("training: {a: [2024-01-31]}\n", r"training.a\[0\]: expected .* got the date 2024-01-31; put it in quotes"),
        ("columns: text\n", "columns: expected a mapping, got 'text'. Columns with other names"),
        ("columns: {text: [a, b]}\n", r"columns.text: expected text, got \['a', 'b'\]"),
        ("max_length: 0\n", "max_length: expected at least 4, got 0"),
        ("max_length: 9223372036854775808\n", "max_length: expected at most 2147483647, got 9223372036854775808"),
        ("max_length: 1e2\n", "max_length: expected a whole number, got 100.0"),
        ("baseline: 'yes'\n", "baseline: expected true or false, got 'yes'"),
        ("baseline: 1\n", "baseline: expected true or false, got 1"),
        ("out: null_\nout: x\n", "given twice: out"),
        ("version: 2\n", "version: got 2, .* reads version 1; a later tunerkit reads this recipe; upgrade"),
        ("version: 2\nsteps: 3\n", "version: got 2"),
        ("version: 0\n", "version: got 0, .* reads version 1; no recipe .*; write version: 1, or .* `tunerkit init`"),
        ("version: '1'\n", "version: got '1'"),
        ("version: true\n", "version: got True"),
        ("version: 1.0\n", r"version: got 1\.0"),
        ("- 1\n", "expected a mapping of settings to values"),
        ("task: [\n", "cannot be read as .yaml"),
        ("training: {a: " + "[" * 20 + "]" * 20 + "}\n", "deeper than 10 levels"),
        (f"data: {'x' * 200_000}\n", "at most 100000 bytes"),
        (f"{'k' * 1000}: 1\n", r"unknown key 'k+\.\.\.k+'"),
    ],
)
def test_a_mistake_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    """It names the file, the key, what was got and what is allowed."""
    with pytest.raises(tunerkit.errors.ConfigError, match=message) as caught:
        read(text, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "r.yaml") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_words_are_what_their_key_needs(tmp_path: Path) -> None:
    """Law: YAML 1.1 reads ``no`` as false, 010 as 8 and 1:30 as 90; where a key takes text alone, they are texts."""
    recipe = read(
        "model: 7\ndata: [on, 2024-01-31]\ncolumns: {text: no, label: 1:30}\nout: 010\nbaseline: yes\n"
        "training: {eval_strategy: no, bf16: off, seed: 1_000}\nmethod: ~\n",
        tmp_path,
    )
    assert recipe == Recipe(
        model="7",
        data=["on", "2024-01-31"],
        columns={"text": "no", "label": "1:30"},
        out="010",
        baseline=True,
        training={"eval_strategy": "no", "bf16": False, "seed": 1000},
    )
    shared = read("columns: &x {text: no}\nconfig: *x\n", tmp_path)
    assert shared.columns == {"text": "no"}
    with pytest.raises(tunerkit.errors.ConfigError, match="model: expected text, got 7; put it in quotes"):
        read('{"model": 7}', tmp_path, "r.json")


@pytest.mark.parametrize(("word", "kept"), [("tell", "warn"), ("warn", "warn"), ("restart", "restart")])
def test_the_earlier_word_for_a_warning_is_read(word: str, kept: str, tmp_path: Path) -> None:
    """Recipes of version 0.1 say ``on_collapse: tell``."""
    assert read(f"on_collapse: {word}\n", tmp_path).on_collapse == kept


def test_all_mistakes_are_in_one_error(tmp_path: Path) -> None:
    """Nobody mends a recipe one line a time."""
    with pytest.raises(tunerkit.errors.ConfigError) as caught:
        read("modle: x\nbaseline: 3\nmax_length: none\n", tmp_path)
    file = tmp_path / "r.yaml"
    assert caught.value.problems == (
        f"{file}: unknown key 'modle'; did you mean 'model'?",
        f"{file}: baseline: expected true or false, got 3. Whether to fit the head alone too, for comparison",
        f"{file}: max_length: expected a whole number, got 'none'. Longer texts are cut to this many tokens",
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """As with settings."""
    with pytest.raises(tunerkit.errors.ConfigError, match=r"gone\.yaml: no such file"):
        read_recipe(tmp_path / "gone.yaml")


def test_keys_of_plugins_are_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They arrive in ``extra``, with a default where they are left out; each recipe has its own copy of it."""
    keys = {**ACME, "tags": {"type": "array", "description": "Tags.", "default": []}}
    monkeypatch.setattr(reading, "additions", lambda: (Addition("acme", recipe_keys=keys),))
    recipe = read("acme: {level: 3}\n", tmp_path)
    assert recipe == Recipe(extra={"acme": {"level": 3}, "tags": []})
    recipe.extra["tags"].append("x")
    assert read("", tmp_path).extra == {"tags": []}
    with pytest.raises(tunerkit.errors.ConfigError, match=r"acme\.level: expected a whole number, got 'high'"):
        read("acme: {level: high}\n", tmp_path)


def test_a_recipe_shares_nothing_with_its_mapping() -> None:
    """A later change of one does not show in the other."""
    mapping: dict[str, Any] = {"training": {"betas": [0.9, 0.99]}}
    recipe = structure(mapping)
    mapping["training"]["betas"].append(1)
    assert recipe.training == {"betas": [0.9, 0.99]}


def test_the_example_in_the_documentation_is_a_recipe(tmp_path: Path) -> None:
    """Every YAML block of the page on recipes is read as it stands."""
    page = (DOCS / "how-to" / "recipes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    assert all(read(block, tmp_path).model for block in blocks)


# --- names that other commands have for keys ---


def test_each_name_leads_to_one_key_that_exists() -> None:
    """Law: a hint is a key of the recipe, an argument of the trainer or a setting of LoRA."""
    settings = {f"config.{field.name}" for field in attrs.fields(LoraConfig)}
    keys = {field.name for field in attrs.fields(Recipe)}
    known = {*keys, *settings, *(f"training.{name}" for name in argument_types()), *FLAGS.values()}
    assert {key.partition("=")[0] for key in reading._KEYS} <= known
    names = [name for others in reading._KEYS.values() for name in others]
    assert len({*names}) == len(names)
    assert not keys & {*names}


def test_an_argument_of_the_trainer_leads_to_its_section() -> None:
    """It is the mistake of those who know transformers."""
    assert reading.key_for("weight_decay") == "training.weight_decay"
    assert reading.key_for("load_in_4bit") == "quantisation=nf4"
    assert reading.key_for("zzz") is None
