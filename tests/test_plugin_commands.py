"""Commands of plugins: found by their entry points, asked through the hook, and never in the way of core's."""

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest

for _module in ("rich", "typer"):
    pytest.importorskip(_module, reason="the command needs the extra [cli]")

import typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import tunerkit  # noqa: E402
from tunerkit.cli import app, plugin_commands  # noqa: E402
from tunerkit.cli.plugin_commands import GROUP, PluginCommands  # noqa: E402


def export(path: str, form: str = "plain") -> None:
    """Write the adapter in another format."""
    if form == "bad":
        raise tunerkit.FileError(f"{path}: no form 'bad';\nchoose plain")
    typer.echo(f"{path} as {form}")


def module(monkeypatch: pytest.MonkeyPatch, name: str, answer: Callable[[], Any], *, marked: bool = True) -> EntryPoint:
    """A module with the hook, and an entry point that names it."""
    made = types.ModuleType(name)
    made.tunerkit_commands = tunerkit.hookimpl(answer) if marked else answer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, made)
    return EntryPoint(name, name, GROUP)


def asked(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> PluginCommands:
    """What core finds if these entry points are installed, here and in the command."""
    found = plugin_commands.plugin_commands(points)
    monkeypatch.setattr(app, "plugin_commands", lambda: found)
    return found


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app.build(), arguments)


def test_a_plugins_command_runs_like_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are options and arguments, its docstring is its help, its errors are one line."""
    found = asked(monkeypatch, module(monkeypatch, "acme", lambda: {"export-acme": export}))
    assert found.problems == ()
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
    ],
)
def test_a_broken_plugin_is_named_and_the_other_commands_work(
    answer: Callable[[], Any], marked: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The help says what is wrong in one sentence; core's commands and those of other plugins go on."""
    other = module(monkeypatch, "other", lambda: {"export-other": export})
    found = asked(monkeypatch, module(monkeypatch, "acme", answer, marked=marked), other)
    assert list(found.commands) == ["export-other"]
    assert len(found.problems) == 1
    assert words in found.problems[0]
    told = run("--help")
    assert told.exit_code == 0
    assert found.problems[0][:40] in " ".join(told.output.split())
    assert run("export-other", "x").output == "x as plain\n"


def test_of_two_plugins_with_one_name_the_first_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins are asked in the order of their names, so the answer is the same in every run."""
    points = [module(monkeypatch, name, lambda: {"export": export}) for name in ("zeta", "alpha")]
    found = plugin_commands.plugin_commands(points)
    assert list(found.commands) == ["export"]
    assert found.problems == ("zeta: there is a command 'export' already; its author must rename it",)
