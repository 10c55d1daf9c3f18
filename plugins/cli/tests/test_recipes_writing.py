"""Writing recipes: to start from, and as they were run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest
from hypothesis import given, settings, strategies as st
from typer.testing import CliRunner

import tunerkit
from tunerkit_cli import app
from tunerkit_cli.plugin_commands import Addition
from tunerkit_cli.recipes import reading
from tunerkit_cli.recipes.reading import read_recipe, structure
from tunerkit_cli.recipes.recipe import TASKS, Recipe, Source, to_mapping
from tunerkit_cli.recipes.writing import RecipeFileError, starter, write_starter
from tunerkit_cli.settings import given_value, write_settings
from tunerkit_cli.tasks import task_of

COLUMNS = {
    "text-classification": ("text", "label"),
    "regression": ("text", "label"),
    "multi-label": ("text", "labels"),
    "token-classification": ("tokens", "tags"),
    "causal-lm": ("text", "prompt", "completion", "messages"),
    "preference": ("prompt", "chosen", "rejected"),
    "orpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "reward": ("prompt", "chosen", "rejected"),
    "grpo": ("prompt", "solution"),
    "seq2seq": ("source", "target"),
    "image-classification": ("image", "label"),
    "embedding": ("anchor", "positive", "negative"),
}
words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words | st.sampled_from(["2e-3", "1", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
mappings = st.dictionaries(words, plain, max_size=3)
paths = words.filter(lambda path: "\0" not in path)
sources = paths | st.builds(Source, paths, name=st.none() | words, split=st.none() | words)
files = st.none() | sources | st.lists(sources, min_size=1, max_size=3)
recipes = st.builds(
    Recipe,
    task=st.none() | st.sampled_from(TASKS),
    model=st.none() | paths,
    data=files,
    eval_data=files,
    method=words,
    config=mappings,
    training=mappings,
    columns=st.dictionaries(words, words, max_size=2),
    max_length=st.none() | st.integers(4, 10**6),
    baseline=st.booleans(),
    on_collapse=st.sampled_from(["warn", "restart"]),
    out=paths,
    extra=st.fixed_dictionaries({}, optional={"acme": mappings}),
)


@settings(max_examples=40)  # YAML is slow
@given(recipe=recipes)
def test_what_was_dumped_is_read_back(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Law: reading a dumped recipe gives an equal one, types included."""
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(write_settings(to_mapping(recipe)), encoding="utf-8", newline="\n")
    keys = {"acme": {"type": "object", "description": "Acme's options."}}
    with mock.patch.object(reading, "additions", return_value=(Addition("acme", recipe_keys=keys),)):
        found = read_recipe(path)
    assert found == recipe
    assert repr(found) == repr(recipe)


def test_a_dump_has_no_empty_keys() -> None:
    """A key without a value says nothing to a reader."""
    written = write_settings(to_mapping(Recipe()))
    assert "eval_data" not in written
    assert written.startswith("version: 1\n")


@pytest.mark.parametrize("task", TASKS)
def test_a_starter_is_a_recipe_for_its_task(task: str, tmp_path: Path) -> None:
    """It reads back as it is, names the columns of the task's data, and has what a first run needs."""
    path = tmp_path / "r.yaml"
    write_starter(task, path)
    recipe = read_recipe(path)
    assert recipe.task == task
    assert recipe.model
    assert recipe.data
    assert set(recipe.training) == {"num_train_epochs", "learning_rate", "per_device_train_batch_size", "seed"}
    assert recipe.training["learning_rate"] == task_of(task).defaults["learning_rate"]
    comments = " ".join(line for line in starter(task).splitlines() if line.startswith("#   "))
    assert all(f" {column}" in comments for column in COLUMNS[task])
    assert max(map(len, starter(task).splitlines())) < 100


@pytest.mark.parametrize("task", TASKS)
def test_what_a_starter_suggests_is_valid_too(task: str) -> None:
    """With each suggested line instead of the one that it replaces, it is still a recipe."""
    texts = [starter(task), *uncommented(starter(task))]
    found: list[Any] = [given_value(text, "starter") for text in texts]
    plain, *changed = map(structure, found)
    assert len(changed) >= 5
    assert all(recipe != plain for recipe in changed)


def uncommented(text: str) -> Iterator[str]:
    """The text with one suggestion at a time: a comment of the form ``# key: value`` with a key in lower case."""
    for found in re.finditer(r"^( *)# ([a-z_]+): (\S.*)$", text, re.MULTILINE):
        indent, key, value = found.groups()
        yield re.sub(rf"^{indent}{key}: .*\n", "", text, flags=re.MULTILINE).replace(
            found[0], f"{indent}{key}: {value}"
        )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("text-clasification", "no task 'text-clasification'; did you mean 'text-classification'"),
        ("chess", "no task 'chess'; the tasks are text-classification, regression, .*image-classification"),
        ("", "no task ''; the tasks are"),
        ("x" * 10_000, "no task 'xxx"),
    ],
)
def test_an_unknown_task_is_named_with_the_closest(task: str, message: str) -> None:
    """The error has the task that was meant, or all of them."""
    with pytest.raises(tunerkit.errors.ConfigError, match=message) as caught:
        starter(task)
    assert len(str(caught.value)) < 500


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    """Also not through a link."""
    path = tmp_path / "r.yaml"
    path.write_text("mine")
    (tmp_path / "link.yaml").symlink_to(path)
    for each in (path, tmp_path / "link.yaml"):
        with pytest.raises(RecipeFileError, match="the file exists already; remove it, or choose another name"):
            write_starter("seq2seq", each)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone/r.yaml", "cannot be written: No such file or directory; choose another folder"),
        ("r.json", "a commented recipe is YAML; choose a name that ends in .yaml"),
        ("r", "choose a name that ends in .yaml"),
        ("a\0.yaml", "cannot be written: "),
        ("x" * 300 + ".yaml", "cannot be written: File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(name: str, message: str, tmp_path: Path) -> None:
    """With the reason, and what to choose."""
    with pytest.raises(RecipeFileError, match=message):
        write_starter("seq2seq", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app.build(), ["init", *arguments])


def test_the_command_prints_or_writes(tmp_path: Path) -> None:
    """Without --out to stdout, so that it can be piped; errors are one line."""
    assert run("multi-label").stdout == starter("multi-label")
    told = run("multi-label", "--out", str(tmp_path / "r.yaml"))
    assert (told.exit_code, told.stdout) == (0, f"written to {tmp_path / 'r.yaml'}; set model and data in it\n")
    assert (tmp_path / "r.yaml").read_text() == starter("multi-label")
    again = run("multi-label", "--out", str(tmp_path / "r.yaml"))
    assert (again.exit_code, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert run("chess").stderr.startswith("tunerkit: no task 'chess'")


def test_the_fields_of_a_recipe_are_plain_values() -> None:
    """Its default is what an empty file is."""
    assert attrs.asdict(Recipe())["training"] == {}
    assert Recipe() == Recipe(version=1, method=None, out="out")
