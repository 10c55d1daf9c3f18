"""The command `tunerkit doctor`: versions, devices, plugins, and what is missing."""

import io
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console
from typer.testing import CliRunner

import tunerkit
from tunerkit.extras import install
from tunerkit.plugin import MethodInfo
from tunerkit_cli import app, installed
from tunerkit_cli.plugin_commands import Addition


def shown() -> tuple[bool, str]:
    """What `tunerkit doctor` prints on a wide terminal, and whether all is well."""
    console = Console(width=300, file=io.StringIO())
    fine = installed.show(console)
    return fine, console.file.getvalue()  # type: ignore[attr-defined]


def test_it_lists_versions_devices_plugins_and_libraries() -> None:
    """Every library that tunerkit itself asks for is there, so none has advice."""
    _, text = shown()
    assert text.startswith(f"tunerkit {tunerkit.__version__}, Python ")
    assert "devices: CPU with" in text
    for name, info in tunerkit.methods().items():
        assert f"│ {name} " in text
        assert info.distribution in text
    rows = [line for line in text.splitlines() if "tunerkit itself" in line]
    assert any(metadata.version("torch") in row for row in rows)
    assert not any("missing" in row for row in rows)


def test_a_missing_and_an_old_library_come_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A missing part is no fault: the answer stays "all is well"."""
    before, _ = shown()
    real = metadata.version

    def version(name: str) -> str:
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "accelerate" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    fine, text = shown()
    assert fine == before
    assert f"plot: {install('plot')}\n" in text
    assert 'accelerate: pip install --upgrade "accelerate>=1.6"\n' in text


def test_no_command_is_cut_where_the_terminal_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stands on a line of its own, to be copied; one extra is named once, however much of it is missing."""
    asked = ["one>=1", "two>=1"]
    monkeypatch.setattr(installed, "parts", lambda: (installed.Part("quantisers", Requirement(r), None) for r in asked))
    out = io.StringIO()
    installed.show(Console(file=out, width=40))
    assert out.getvalue().splitlines().count(f"quantisers: {install('quantisers')}") == 1


def test_it_lists_every_extra_for_users() -> None:
    """Those for work on tunerkit itself, and those that only name others, are left out."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    assert extras - set(installed.EXTRAS) == {"all", "demo", "dev", "test"}
    assert set(installed.EXTRAS) <= extras


@pytest.mark.parametrize("broken", ["method", "commands", "verb"])
def test_a_broken_plugin_makes_the_exit_code_1(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its error is printed, whether the plugin adds methods, commands or a verb."""
    methods: dict[str, Any] = {"acme": MethodInfo("acme-plugin", "3.1", None)}
    if broken == "method":
        methods["acme"] = MethodInfo("acme-plugin", "3.1", "ImportError: no libacme")
    elif broken == "verb":
        info = tmp_path / "acme_plugin-3.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-plugin\nVersion: 3.1\n", encoding="utf-8")
        (info / "entry_points.txt").write_text("[tunerkit.verbs]\nacme = libacme:verb\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(vars(tunerkit), "_points", cache(vars(tunerkit)["_points"].__wrapped__))
    else:
        problem = "the commands of acme-plugin cannot be loaded: ImportError: no libacme"
        monkeypatch.setattr(app, "additions", lambda: (Addition("acme-plugin", problem=problem),))
    monkeypatch.setattr(tunerkit, "methods", lambda: methods)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app.build(), ["doctor"])
    assert done.exit_code == 1
    assert ("No module named 'libacme'" if broken == "verb" else "no libacme") in done.output
    assert "acme-plugin" in done.output
