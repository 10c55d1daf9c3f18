"""Commands of plugins: found by their entry points, asked through the hook, and never in the way of core's."""

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import tunerkit
from tunerkit_cli import app
from tunerkit_cli.commands import COMMANDS
from tunerkit_cli.plugin_commands import GROUP, Addition, additions, commands_of
from tunerkit_cli.recipes import reading


def export(path: str, form: str = "plain") -> None:
    """Write the adapter in another format."""
    if form == "bad":
        raise tunerkit.errors.FileError(f"{path}: no form 'bad';\nchoose plain")
    typer.echo(f"{path} as {form}")


def module(monkeypatch: pytest.MonkeyPatch, name: str, answer: Callable[[], Any], *, marked: bool = True) -> EntryPoint:
    """A module with the hook, and an entry point that names it."""
    made = types.ModuleType(name)
    made.tunerkit_commands = tunerkit.hookimpl(answer) if marked else answer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, made)
    return EntryPoint(name, name, GROUP)


def asked(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> tuple[Addition, ...]:
    """What is found if these entry points are installed, here and in the command."""
    found = additions(points)
    monkeypatch.setattr(app, "additions", lambda: found)
    return found


def problems_of(found: tuple[Addition, ...]) -> list[str]:
    return [each.problem for each in found if each.problem] + [*commands_of(found, COMMANDS)[1]]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app.build(), arguments)


def test_a_plugins_command_runs_like_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are options and arguments, its docstring is its help, its errors are one line."""
    found = asked(monkeypatch, module(monkeypatch, "acme", lambda: {"export-acme": export}))
    assert problems_of(found) == []
    assert "export-acme" in run("--help").output
    assert "Write the adapter in another format." in run("export-acme", "--help").output
    assert run("export-acme", "out", "--form", "wide").output == "out as wide\n"
    refused = run("export-acme", "out", "--form", "bad")
    assert (refused.exit_code, refused.stderr) == (2, "tunerkit: out: no form 'bad';; choose plain\n")


def fails() -> Any:
    raise OSError("no such library:\nlibacme")


@pytest.mark.parametrize(
    ("answer", "marked", "words"),
    [
        (fails, True, "the commands of acme cannot be loaded: no such library: libacme"),
        (lambda: {"export": export}, False, "acme has no function tunerkit_commands marked with tunerkit.hookimpl"),
        (lambda: [export], True, "expected a mapping of names to functions"),
        (lambda: {"export": "text"}, True, "expected a mapping of names to functions"),
        (lambda: {"train": export}, True, "acme: there is a command 'train' already; its author must rename it"),
        (lambda: {"eval": export}, True, "acme: there is a command 'eval' already; its author must rename it"),
    ],
)
def test_a_broken_plugin_is_named_and_the_other_commands_work(
    answer: Callable[[], Any], marked: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The help says what is wrong in one sentence; core's commands and those of other plugins go on."""
    other = module(monkeypatch, "other", lambda: {"export-other": export})
    found = asked(monkeypatch, module(monkeypatch, "acme", answer, marked=marked), other)
    assert [*commands_of(found, COMMANDS)[0]] == ["export-other"]
    (problem,) = problems_of(found)
    assert words in problem
    told = run("--help")
    assert told.exit_code == 0
    assert problem[:40] in " ".join(told.output.split())
    assert run("export-other", "x").output == "x as plain\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_plugin_replaces_a_command_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: each of our own commands keeps its name, and the plugin's author is told."""
    added = additions([module(monkeypatch, "acme", lambda: {name: export})])
    problem = f"acme: there is a command {name!r} already; its author must rename it"
    assert commands_of(added, COMMANDS) == ({}, (problem,))


def test_of_two_plugins_with_one_name_the_first_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins are asked in the order of their names, so the answer is the same in every run."""
    points = [module(monkeypatch, name, lambda: {"export": export}) for name in ("zeta", "alpha")]
    found = commands_of(additions(points), ())
    assert found == ({"export": export}, ("zeta: there is a command 'export' already; its author must rename it",))


def keyed(monkeypatch: pytest.MonkeyPatch, name: str, answer: Callable[[], Any], commands: Any = None) -> EntryPoint:
    """A module with the hook for keys of recipes, and perhaps the one for commands too."""
    point = module(monkeypatch, name, lambda: commands or {}, marked=commands is not None)
    sys.modules[name].tunerkit_recipe_keys = tunerkit.hookimpl(answer)  # type: ignore[attr-defined]
    return point


def returning(answer: object) -> Callable[[], object]:
    return lambda: answer


FRAGMENT = {"type": "object", "description": "Acme's options."}


@pytest.mark.parametrize("commands", [None, {"export-acme": export}])
def test_a_plugin_adds_keys_to_recipes_with_or_without_commands(
    commands: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One module may implement either hook or both."""
    found = additions([keyed(monkeypatch, "acme", lambda: {"acme": FRAGMENT}, commands)])
    assert found == (Addition("acme", commands or {}, {"acme": FRAGMENT}),)
    assert reading.keys_of(found) == ({"acme": FRAGMENT}, ())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (fails, "the commands of acme cannot be loaded: no such library: libacme"),
        (lambda: ["acme"], "tunerkit_recipe_keys returned ['acme']; expected a mapping of keys to JSON schema"),
        (lambda: {1: FRAGMENT}, "expected a mapping of keys to JSON schema"),
        (lambda: {"training": FRAGMENT}, "the recipe key 'training' is left out: there is a key of this name already"),
        (lambda: {"extra": FRAGMENT}, "'extra' is left out: there is a key of this name already"),
        (lambda: {"Acme": FRAGMENT}, "the recipe key 'Acme' is left out: a key has at most 40 letters"),
        (lambda: {"a.b": FRAGMENT}, "the recipe key 'a.b' is left out: a key has at most 40 letters"),
        (lambda: {"a" * 41: FRAGMENT}, "is left out: a key has at most 40 letters"),
        (lambda: {"acme": {"type": "object"}}, "'acme' is left out: it has no description; its author must change it"),
        (lambda: {"acme": {"type": "map"}}, "'acme' is left out: type[0]: expected string, integer"),
        (lambda: {"acme": "object"}, "'acme' is left out: expected a mapping, got 'object'"),
    ],
)
def test_a_broken_key_is_named_and_left_out(
    answer: Callable[[], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of other plugins stay, and the help names the problem."""
    points = [keyed(monkeypatch, "acme", answer), keyed(monkeypatch, "zeta", lambda: {"zeta": FRAGMENT})]
    found = asked(monkeypatch, *points)
    keys, left_out = reading.keys_of(found)
    assert keys == {"zeta": FRAGMENT}
    (problem,) = (*problems_of(found), *left_out)
    assert words in problem
    assert problem[:40] in " ".join(run("--help").output.split())


def test_of_two_plugins_with_one_key_the_first_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with commands, and the schema shows the first one's."""
    fragments = {name: {**FRAGMENT, "description": f"{name}."} for name in ("zeta", "alpha")}
    points = [keyed(monkeypatch, name, returning({"acme": fragment})) for name, fragment in fragments.items()]
    found = additions(points)
    assert reading.keys_of(found)[1] == (
        "zeta: the recipe key 'acme' is left out: there is a key of this name already; its author must change it",
    )
    monkeypatch.setattr(reading, "additions", lambda: found)
    assert reading.schema()["properties"]["acme"]["description"] == "alpha."
    assert reading.structure({"acme": {"a": 1}}).extra == {"acme": {"a": 1}}
