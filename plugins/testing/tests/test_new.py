"""A new method from a template: it works as generated, and bad input leaves nothing behind."""

import ast
import copy
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import tunerkit
from tests.support.lengths import LONG, is_long
from tunerkit import injection
from tunerkit_testing import check_method, small
from tunerkit_testing.known_cases import NETWORK
from tunerkit_testing.new import FORMS, Names, NewMethodError, write_distribution
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import ShiftPlugin

ROOT = Path(__file__).parents[3]
COMMON = {
    *("pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/ci.yml"),
    *("package/__init__.py", "package/py.typed"),
    *("tests/test_conformance.py", "tests/test_readme.py", "tests/test_reference.py"),
}
PARTS = {"package/config.py", "package/adapter.py", "package/plugin.py"}
MORE = {
    "function": {"package/method.py"},
    "scheduled": {*PARTS, "package/schedule.py", "package/training.py", "tests/test_schedule.py"},
}


@attrs.frozen
class Generated:
    """A generated distribution whose package can be imported and whose plugin is registered."""

    form: str
    folder: Path
    names: Names
    plugin: Any

    def texts(self) -> dict[str, str]:
        """The text of each file, by its path with "package" for the package's name."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {
            path.relative_to(self.folder).as_posix().replace(self.names.package, "package"): path.read_text("utf-8")
            for path in files
        }


@contextmanager
def registered_as(method: str, form: str, folder: Path) -> Iterator[Generated]:
    """Write a form and register it for the length of a block."""
    names = Names(method)
    with pytest.MonkeyPatch.context() as patch:
        written = write_distribution(method, form, folder)
        patch.syspath_prepend(written)
        project = tomllib.loads((written / "pyproject.toml").read_text("utf-8"))["project"]
        module, _, name = project["entry-points"]["tunerkit"][method].partition(":")
        plugin: Any = importlib.import_module(module)
        plugin = getattr(plugin, name) if name else plugin
        with registered(plugin):
            yield Generated(form, written, names, plugin)
    for module in [name for name in sys.modules if name.partition(".")[0] == names.package]:
        del sys.modules[module]


@pytest.fixture(scope="module", params=list(FORMS))
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generated]:
    """Each form, written to a temporary folder and registered in this process."""
    with registered_as(f"new-{request.param}", request.param, tmp_path_factory.mktemp("new")) as found:
        yield found


# --- What is generated ---


def test_every_file_of_a_distribution_is_there(generated: Generated) -> None:
    """Each form has exactly the files that are listed above."""
    assert set(generated.texts()) == COMMON | MORE.get(generated.form, PARTS)


def test_no_placeholder_is_left(generated: Generated) -> None:
    """The only dollars are those of GitHub's expressions and of paths in a config; Python and YAML files are valid."""
    for path, text in generated.texts().items():
        assert not re.search(r"\$(?!\{\{|\.|\")", text), path
        assert text == "" or (text.endswith("\n") and not text.endswith("\n\n")), path
        if path.endswith(".py"):
            ast.parse(text)
        if path.endswith(".yml"):
            yaml = pytest.importorskip("yaml")
            runs = [step["run"].strip() for step in yaml.safe_load(text)["jobs"]["test"]["steps"] if "run" in step]
            assert runs[1].startswith(f"tunerkit check {generated.names.method}")


def test_the_project_names_its_plugin_and_the_tunerkit_it_needs(generated: Generated) -> None:
    """The entry point is the plugin, a module or a function; the installed tunerkit satisfies the requirement."""
    project = tomllib.loads(generated.texts()["pyproject.toml"])["project"]
    assert project["name"] == f"tunerkit-new-{generated.form}"
    named = "method:new_function" if generated.form == "function" else "plugin"
    assert project["entry-points"]["tunerkit"] == {generated.names.method: f"{generated.names.package}.{named}"}
    (needed,) = (text for text in project["dependencies"] if text.startswith("tunerkit>"))
    assert metadata.version("tunerkit").startswith(needed.removeprefix("tunerkit>="))
    assert getattr(generated.plugin, "TUNERKIT_API", 2) == 2


def test_the_method_keeps_the_contract(generated: Generated) -> None:
    """It passes every check of the kit that applies to it, with the settings of its own tests."""
    results = check_method(generated.names.method, FORMS[generated.form].settings, [NETWORK])
    assert [result for result in results if result.status not in ("passed", "skipped")] == []
    assert sum(result.status == "passed" for result in results) > len(results) / 2


def test_the_readmes_example_runs(generated: Generated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run from top to bottom, it leaves an adapter file."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```$", generated.texts()["README.md"], re.MULTILINE | re.DOTALL)
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    assert (tmp_path / "out" / "adapter.safetensors").exists()


def test_the_stub_skips_until_it_is_filled_in(generated: Generated) -> None:
    """As generated it is skipped, and the reason says where to write the reference."""
    with pytest.raises(pytest.skip.Exception, match=r"fill in reference\(\) in tests/test_reference.py"):
        _stub(generated.texts()["tests/test_reference.py"])()


def test_the_stub_compares_once_it_is_filled_in(generated: Generated) -> None:
    """With the line that its own docstring gives, it passes; with a reference that differs by 1e-6, it fails."""
    text = generated.texts()["tests/test_reference.py"]
    (example,) = re.findall(r"^        (return base\(x\) .*)$", text, re.MULTILINE)
    (skip,) = re.findall(r"^    (pytest\.skip\(.*\))$", text, re.MULTILINE)
    _stub(text.replace(skip, example))()
    with pytest.raises(AssertionError, match="not close"):
        _stub(text.replace(skip, f"{example} * (1 + 1e-6)"))()


def _stub(text: str) -> Any:
    namespace: dict[str, Any] = {"__name__": "stub"}
    exec(compile(text, "test_reference.py", "exec"), namespace)
    return namespace["test_output_and_gradients_equal_the_references"]


# --- What the forms do ---


@pytest.mark.parametrize("method", ["class", "setting", "nn", "p"])
def test_a_function_has_a_name_that_means_nothing_else(method: str, tmp_path: Path) -> None:
    """A keyword of Python, or a name that the file imports, gets an underscore; the method's name stays."""
    with registered_as(method, "function", tmp_path) as found:
        assert found.plugin.__name__ == {"p": "p"}.get(method, f"{method}_")
        (result,) = check_method(method, cases=[NETWORK], checks=["pickle"])
    assert result.status == "passed"


@pytest.fixture
def scheduled(tmp_path: Path) -> Iterator[str]:
    """The name of the scheduled form's method, registered."""
    with registered_as("new-falling", "scheduled", tmp_path) as found:
        yield found.names.method


SETTINGS = {"targets": ["0", "2"], "init_rank": 5, "rank": 2}


def attached(model: nn.Module, steps: int, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Any:
    """An optimizer of the model's trained parameters, attached for a number of steps."""
    optimizer: Any = kind(small.trainable(model), lr=1e-2)  # type: ignore[call-arg]
    tunerkit.attach(model, optimizer, total_steps=steps)
    return optimizer


def test_the_rank_falls_while_training(scheduled: str, tmp_path: Path) -> None:
    """It starts at init_rank and has the final rank from 0.7 of the steps on; budgets agree, and the loss falls."""
    model = tunerkit.wrap(small.net(), scheduled, SETTINGS, seed=0)
    tuner, optimizer = tunerkit.tuner(model), attached(model, 10)
    assert set(tuner.ranks().values()) == {5}
    with pytest.raises(tunerkit.errors.AdapterError):  # it would have the first rank
        tunerkit.save(model, tmp_path / "untrained")
    losses = []
    for step in range(1, 11):
        losses += small.train(model, optimizer, 1)
        assert sum(tuner.ranks().values()) == tuner.budget(step) == tuner.budget()
        assert (set(tuner.ranks().values()) == {2}) == (step >= 7)
    assert losses[-1] < losses[0]


def test_the_least_important_columns_go(scheduled: str) -> None:
    """A column whose gradient has always been 0 is removed before all others."""
    model = tunerkit.wrap(small.net(), scheduled, {**SETTINGS, "init_rank": 3, "end": 1.0}, seed=0)
    adapters = tunerkit.tuner(model).adapters()
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.get_parameter("q")[1] = 0.0  # so p[:, 1] gets no gradient
    kept = {path: adapter.get_parameter("q")[[0, 2]].sign() for path, adapter in adapters.items()}
    optimizer = torch.optim.SGD(small.trainable(model), lr=1e-3)
    tunerkit.attach(model, optimizer, total_steps=2)
    small.train(model, optimizer, 2)
    assert all(torch.equal(adapter.get_parameter("q").sign(), kept[path]) for path, adapter in adapters.items())


@pytest.mark.filterwarnings("ignore:.*above the final.*:tunerkit.TunerkitWarning")  # saved before the end
def test_training_resumes_bit_for_bit(scheduled: str, tmp_path: Path) -> None:
    """Saved after some steps and resumed in a new model, it ends with the same weights and ranks."""
    model = tunerkit.wrap(small.net(), scheduled, SETTINGS, seed=0)
    optimizer = attached(model, 10)
    small.train(model, optimizer, 4)
    tunerkit.save(model, tmp_path)
    tunerkit.save_state(model, tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    resumed = tunerkit.load(small.net(), tmp_path, trainable=True)
    again = attached(resumed, 10)
    again.load_state_dict(kept)
    tunerkit.load_state(resumed, tmp_path)
    for each, its_optimizer in ((model, optimizer), (resumed, again)):
        small.train(each, its_optimizer, 6)
    (one, other) = (tunerkit.tuner(each) for each in (model, resumed))
    assert one.ranks() == other.ranks()
    assert injection.training_state(one).tensors.keys() == {"0", "2"}
    for path, average in injection.training_state(one).tensors.items():
        assert torch.equal(average, injection.training_state(other).tensors[path])
    assert all(map(torch.equal, small.trainable(model), small.trainable(resumed)))


def test_what_cannot_be_scheduled_is_refused_at_attach(scheduled: str) -> None:
    """Without a length of training, or with an optimizer whose state cannot shrink, an error says what to do."""
    model = tunerkit.wrap(small.net(), scheduled, SETTINGS)
    with pytest.raises(tunerkit.errors.StepError, match=r"total_steps="):
        tunerkit.attach(model, torch.optim.SGD(small.trainable(model)))
    with pytest.raises(tunerkit.errors.StepError, match=r"Adafactor.*AdamW"):
        attached(tunerkit.wrap(small.net(), scheduled, SETTINGS), 10, torch.optim.Adafactor)
    with pytest.raises(tunerkit.errors.ConfigError, match=r"init_rank >= rank, 5, got 4 @ \$\.init_rank"):
        tunerkit.structure(scheduled, {"rank": 5, "init_rank": 4})


# --- Bad input ---


@pytest.mark.parametrize(
    ("method", "closest"),
    [
        ("My Method", "my-method"),
        ("my_method", "my-method"),
        ("my--method-", "my-method"),
        ("../escape", "escape"),
        ("2fast", "fast"),
        ("Übung", "ubung"),
        ("tunerkit-mine", "mine"),
        ("tunerkit_mine", "mine"),
        ("", "my-method"),
        ("-", "my-method"),
        ("\U0001f600", "my-method"),
        ("a\nb", "a-b"),
        ("a" * 41, "a" * 40),
        ("x" * 100_000, "x" * 40),
        ("adapter", "adapter-2"),
        ("Adapter", "adapter-2"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_the_closest_one(method: str, closest: str, tmp_path: Path) -> None:
    """One line has the name, the rule and the closest name; no file is written."""
    with pytest.raises(NewMethodError, match=r"^a method cannot be named ") as caught:
        write_distribution(method, "hooks", tmp_path)
    assert str(caught.value).endswith(f"for example {closest!r}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50)
@given(st.text(max_size=50))
def test_the_name_that_an_error_gives_is_accepted(method: str) -> None:
    """Whatever the name was, the command works with the suggested one."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_distribution(method, "hooks", Path(folder))
        except NewMethodError as refused:
            (suggested,) = re.findall(r"for example '([^']+)'$", str(refused))
            assert write_distribution(suggested, "hooks", Path(folder)).is_dir()


def test_the_name_of_an_installed_method_is_taken(tmp_path: Path) -> None:
    """The error has the distribution that brings the method, and a free name."""
    with (
        registered(ShiftPlugin()),
        pytest.raises(NewMethodError, match=r"in-process has a method of this name; .*'toy-shift-2'$"),
    ):
        write_distribution("toy-shift", "hooks", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_an_installed_distribution_or_package_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another distribution of that name would be replaced by pip, and another package would hide the new one."""
    site, into = tmp_path / "site", tmp_path / "into"
    for folder in (site / "tunerkit_taken-1.5.dist-info", site / "tunerkit_plain", into):
        folder.mkdir(parents=True)
    (site / "tunerkit_taken-1.5.dist-info" / "METADATA").write_text("Name: tunerkit-taken\nVersion: 1.5\n")
    (site / "tunerkit_plain" / "__init__.py").touch()
    monkeypatch.syspath_prepend(site)
    with pytest.raises(NewMethodError, match=r"tunerkit-taken 1.5 is installed; .*'taken-2'$"):
        write_distribution("taken", "hooks", into)
    with pytest.raises(NewMethodError, match=r"there is a package tunerkit_plain; .*'plain-2'$"):
        write_distribution("plain", "hooks", into)
    assert list(into.iterdir()) == []


@pytest.mark.parametrize("what", ["folder", "file", "link to nowhere"])
def test_what_exists_is_not_overwritten(what: str, tmp_path: Path) -> None:
    """A folder, a file or a dangling link of that name stays as it is."""
    there = tmp_path / "tunerkit-new-one"
    if what == "folder":
        there.mkdir()
        (there / "mine.txt").write_text("mine")
    elif what == "file":
        there.write_text("mine")
    else:
        there.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NewMethodError, match=r"tunerkit-new-one exists already; .* --into another folder$"):
        write_distribution("new-one", "hooks", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("into", ["missing", "a file", "x" * 300])
def test_a_place_that_cannot_be_written_is_named(into: str, tmp_path: Path) -> None:
    """A folder that does not exist, a file, or a name that is too long: one error, and nothing is created."""
    (tmp_path / "a file").touch()
    with pytest.raises(NewMethodError, match=r"tunerkit-new-one cannot be written: .* --into$"):
        write_distribution("new-one", "hooks", tmp_path / into)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("number", [1, 7])
def test_nothing_is_left_half_written(
    error: BaseException, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If writing any file fails, or is interrupted, no folder is left."""
    write, calls = Path.write_text, iter(range(1, 100))

    def failing(path: Path, *args: Any, **kwargs: Any) -> int:
        if next(calls) == number:
            raise error
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises((NewMethodError, KeyboardInterrupt)):
        write_distribution("new-one", "hooks", tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- The command ---


def command(*arguments: object) -> Any:
    """The result of ``tunerkit new`` with these arguments."""
    for module in ("platformdirs", "pyarrow", "rich", "transformers", "typer", "yaml"):
        pytest.importorskip(module, reason="the command needs the extra [cli]")
    from typer.testing import CliRunner

    from tunerkit_cli.app import build

    return CliRunner().invoke(build(), ["new", *map(str, arguments)])


@pytest.mark.parametrize("form", [None, *FORMS])
def test_the_command_writes_the_chosen_form_here(
    form: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an option it is the function, in the current folder; the next commands are printed."""
    monkeypatch.chdir(tmp_path)
    done = command("new-one", *([] if form is None else ["--form", form]))
    assert done.exit_code == 0, done.output
    assert "pip install -e 'tunerkit-new-one[test]' && tunerkit check new-one" in done.output
    expected = write_distribution("new-one", form or "function", tmp_path / "tunerkit-new-one")
    for path in expected.rglob("*"):
        assert path.is_dir() or (tmp_path / path.relative_to(expected.parent)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_the_command_lists_every_file_that_its_author_changes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files but those that stay as they are; each with what it contains."""
    monkeypatch.chdir(tmp_path)
    output = command("new-one", "--form", form).output
    listed = {line.partition(":")[0].strip() for line in output.partition("make it yours:\n")[2].splitlines()}
    folder = tmp_path / "tunerkit-new-one"
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    stay = {".gitignore", ".github/workflows/ci.yml", "LICENSE", "tests/test_readme.py", "tests/test_schedule.py"}
    assert listed == written - stay - {"tunerkit_new_one/__init__.py", "tunerkit_new_one/py.typed"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["New One"], "for example 'new-one'"),
        (["new-one", "--form", "low-rank"], "--form: choose function, hooks or scheduled, got 'low-rank'"),
        (["new-one", "--into", "missing"], "No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line starts with the command's name, without a traceback, and no file is written."""
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("tunerkit: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- In a clean environment ---


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a new environment: tunerkit is installed from its wheel, other libraries are those of this one."""
    if not is_long():
        pytest.skip(f"builds an environment, which takes a minute or more: set {LONG}=1")
    for module in ("hatchling", "mypy", "typer"):
        pytest.importorskip(module, reason="needs the extra [dev]")
    folder = tmp_path_factory.mktemp("clean") / "env"
    run(sys.executable, "-m", "venv", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    libraries = sysconfig.get_path("purelib")
    (site / "libraries.pth").write_text(f"import site; site.addsitedir({libraries!r})\n")
    run(folder / "bin" / "python", *PIP, "install", *OFFLINE, ROOT)
    return folder / "bin"


@pytest.mark.parametrize("form", FORMS)
def test_a_distribution_works_as_generated_in_a_clean_environment(form: str, clean: Path, tmp_path: Path) -> None:
    """It installs, passes `tunerkit check`, its own tests and mypy, and builds a wheel with its typing marker."""
    method = f"new-{form}"
    run(clean / "python", "-m", "tunerkit_cli", "new", method, "--form", form, cwd=tmp_path)
    project = tmp_path / f"tunerkit-{method}"
    run(clean / "python", *PIP, "install", *OFFLINE, project)
    run(clean / "tunerkit", "check", method, cwd=tmp_path)  # its exit code says that nothing failed
    ran = run(clean / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    assert "there is no reference yet" in ran
    assert " failed" not in ran
    run(clean / "python", "-m", "mypy", cwd=project)
    run(clean / "python", *PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path, project)
    (wheel,) = tmp_path.glob("*.whl")
    package = Names(method).package
    assert {f"{package}/py.typed", f"{package}/{'method' if form == 'function' else 'plugin'}.py"} <= set(
        zipfile.ZipFile(wheel).namelist()
    )


PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


def run(*command: object, cwd: Path | None = None) -> str:
    """The output of a command, which must succeed. It imports nothing from this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH", LONG)}
    started = time.perf_counter()
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    print(
        f"\n{time.perf_counter() - started:6.1f} s  {' '.join(map(str, command))}\n{done.stdout[-300:]}"
    )  # -s shows it
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
