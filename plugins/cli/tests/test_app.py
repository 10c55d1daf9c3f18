"""The command as a program: what it costs to ask it something, how it answers, and how an exception ends."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import tunerkit
from tunerkit.extras import install
from tunerkit_cli import app
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

# Importing torch or transformers takes seconds, and pyarrow a part of one.
SLOW = ("torch", "transformers", "pyarrow", "numpy", "matplotlib", "tunerkit_lora", "tunerkit_adalora")
TORCH = {"torch", "transformers", "datasets", "accelerate", "peft", "torchao", "bitsandbytes"}
LIBRARIES = {"transformers", "datasets", "accelerate", "trl", "diffusers", "sklearn", "torchao", "bitsandbytes", "hqq"}
# Runs the command in a process of its own and writes the names of all modules that it imported.
_LISTING = """
import atexit, sys
from pathlib import Path
names = Path(sys.argv.pop(1))
atexit.register(lambda: names.write_text(" ".join(sys.modules)))
from tunerkit_cli import main
main()
"""


# --- What a command imports ---


def told(*arguments: str) -> tuple[int, str, list[str]]:
    """The exit code of ``tunerkit``, all its output, and the slow modules it imported."""
    script = f"""
import sys
from tunerkit_cli import main
sys.argv = ["tunerkit", *{list(arguments)!r}]
try:
    main()
except SystemExit as end:
    code = end.code
print("imported", [name for name in {SLOW!r} if name in sys.modules], code or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1800, check=True)
    output, _, end = done.stdout.rpartition("imported ")
    names, _, code = end.strip().rpartition(" ")
    return int(code), output + done.stderr, [name for name in SLOW if name in names]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "Commands"),
        (["train", "--help"], 0, "--epochs"),
        (["--version"], 0, f"tunerkit {tunerkit.__version__}"),
        (["trian"], 2, "Did you mean 'train'?"),
        (["train", "--epoch", "2"], 2, "--epochs"),
        (["train", "--learning-rate", "1e-3"], 2, "did you mean --lr?"),
        (["train", "--lora-r", "8"], 2, "did you mean --set config.rank=VALUE?"),
        (["train", "--streaming"], 2, "did you mean --set 'data={path: org/name"),
        (["train", "--load-in-4bit"], 2, "did you mean --set quantisation=nf4?"),
        (["train", "--lr", "0"], 2, "--lr: expected a number above 0, got 0.0"),
        (["train", "--config", "gone.yaml"], 2, "gone.yaml: no such file"),
        (["report", "gone"], 2, "gone: no such folder"),
        (["check", "lora", "--config", "{rank"], 2, "--config: cannot be read"),
        (["init", "causal-lm"], 0, "task: causal-lm"),
        (["init", "casual-lm"], 2, "no task 'casual-lm'; did you mean 'causal-lm'?"),
        (["schema"], 0, '"title": "A recipe of tunerkit"'),
        (["schema", "kto"], 0, '{"prompt": "Name a colour.", "completion": "Blue.", "label": true}'),
    ],
)
def test_help_and_errors_import_nothing_slow(arguments: list[str], code: int, words: str) -> None:
    """They cost a fraction of a CPU second: neither torch nor a method's plugin is needed for them."""
    found, output, slow = told(*arguments)
    assert (found, slow) == (code, [])
    assert words in output


def test_the_module_is_the_command() -> None:
    """``python -m tunerkit`` is there where installed scripts are not on the PATH."""
    done = subprocess.run([sys.executable, "-m", "tunerkit", "--version"], capture_output=True, text=True, timeout=1800)
    assert (done.returncode, done.stdout) == (0, f"tunerkit {tunerkit.__version__}\n")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run, with an adapter's file."""
    folder = tmp_path_factory.mktemp("run")
    with registered(LowRankPlugin()):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        with pytest.warns(tunerkit.TunerkitWarning, match="untrained"):
            tunerkit.save(tunerkit.wrap(model, "toy-low-rank", {"rank": 2, "targets": ["0"]}), folder)
    record = {"version": 1, "task": "text-classification", "method": "toy-low-rank", "model": {"source": "b\u00e9rt"}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        ("--help", TORCH),
        ("show OUT", TORCH),
        ("show OUT --json", TORCH),
        ("methods", LIBRARIES),
    ],
)
def test_a_command_imports_what_it_needs_and_prints_no_warnings(
    arguments: str, forbidden: set[str], outputs: Path, tmp_path: Path
) -> None:
    """Law: what explains and shows a run imports no torch, what lists the plugins no other library; stderr is empty."""
    given = arguments.replace("OUT", str(outputs)).split()
    names = tmp_path / "names"
    done = subprocess.run([sys.executable, "-c", _LISTING, names, *given], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert forbidden & {*names.read_text().split()} == set()


def test_warnings_of_libraries_about_their_own_builds_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever torchao is installed, transformers imports it, and it warns of parts built for other machines."""
    monkeypatch.setattr(app, "build", lambda: lambda: logging.getLogger("torchao").warning("Failed to load"))
    logger = logging.getLogger("torchao")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    logger.addHandler(handler)
    try:
        app.run()
    finally:
        logger.removeHandler(handler)
    assert records == []


# --- Exceptions ---


def end_of(problem: BaseException, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command that raises."""

    def command() -> None:
        raise problem

    monkeypatch.setattr(app, "COMMANDS", {"fail": command, "other": lambda: None})
    return CliRunner().invoke(app.build(), ["fail"])


def caused(problem: Exception, cause: Exception) -> Exception:
    problem.__cause__ = cause
    return problem


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (tunerkit.errors.ConfigError(["a: b", "c"]), 2, "a: b; c"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "a/b: No space left on device; free some space"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", b"a"), 2, "a: Permission denied; check its permissions"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), 2, "a: Is a directory"),
        (OSError("cannot reach\nthe hub"), 2, "cannot reach; the hub"),
        (RuntimeError("I/O error: ... (os error 28)"), 2, "a file cannot be read or written: No space left on device"),
        (caused(ValueError("x"), OSError(errno.EFBIG, "File too large", "a")), 2, "a: File too large; free some"),
        ("\ud800", 2, "a text, a name or a path cannot be written as utf-8: '\\ud800' is not a character but half of"),
        ("\udcff", 2, "a text, a name or a path cannot be written as utf-8: '\\udcff' is not a character but a byte"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("bad\nvalue"), 1, "internal error: ValueError: bad; value; the full trace is in "),
        (KeyError(), 1, "internal error: KeyError:; the full trace is in "),
    ],
)
def test_an_exception_of_a_command_is_one_line(
    problem: BaseException | str, code: int, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law: 2 for what a user can change, 1 for what only we can, 130 for Ctrl-C; one line on stderr says what it is."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if isinstance(problem, str):
        try:
            problem.encode()
        except UnicodeEncodeError as error:
            problem = error
    assert isinstance(problem, BaseException)
    done = end_of(problem, monkeypatch)
    assert done.exit_code == code
    assert done.stderr.startswith(f"tunerkit: {line}")
    assert done.stderr.count("\n") == 1
    assert len([*tmp_path.iterdir()]) == (code == 1)


def test_the_trace_of_an_internal_error_is_kept_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The line names the file, and the plugin that raised; with ``TUNERKIT_TRACEBACK`` the trace is printed instead."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    problem = ValueError("bad \ud800")
    problem.add_note("raised by the plugin of acme")
    done = end_of(problem, monkeypatch)
    (trace,) = tmp_path.iterdir()
    assert f"ValueError: bad \\ud800; raised by the plugin of acme; the full trace is in {trace};" in done.stderr
    text = trace.read_text()
    assert text.startswith(f"tunerkit {tunerkit.__version__}, Python ")
    assert "Traceback" in text
    assert "raised by the plugin of acme" in text
    monkeypatch.setenv("TUNERKIT_TRACEBACK", "1")
    done = end_of(problem, monkeypatch)
    assert (done.exception, done.stderr) == (problem, "")


def test_a_trace_that_cannot_be_written_is_one_line_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A full disk may be what went wrong."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    done = end_of(ValueError("bad"), monkeypatch)
    assert done.exit_code == 1
    assert "the full trace cannot be written (No such file or directory): set TUNERKIT_TRACEBACK=1" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "end", [typer.Exit(3), typer.Abort(), typer.BadParameter("no")], ids=["Exit", "Abort", "usage"]
)
def test_what_typer_raises_is_typers(end: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit codes and its messages about options stay."""
    done = end_of(end, monkeypatch)
    assert done.exit_code in (1, 2, 3)
    assert "internal error" not in done.stderr


def test_warnings_of_ours_are_notes_and_those_of_libraries_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the command: neither the line of the code nor a library's word on its own future is the user's."""

    def command() -> None:
        for _ in range(2):
            warnings.warn("some [layers] are left out", tunerkit.TunerkitWarning, stacklevel=1)
        warnings.warn("this will be removed", FutureWarning, stacklevel=1)

    monkeypatch.setattr(app, "COMMANDS", {"warn": command, "other": lambda: None})
    done = CliRunner().invoke(app.build(), ["warn"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "note: some [layers] are left out\n")


def closed() -> int:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
@pytest.mark.parametrize(
    ("opened", "code", "stderr"),
    [
        (closed, 141, ""),
        (
            lambda: os.open("/dev/full", os.O_WRONLY),
            2,
            "tunerkit: No space left on device; free some space, or choose a place on another disk\n",
        ),
    ],
    ids=["closed pipe", "full"],
)
def test_output_that_cannot_be_written_is_no_traceback(opened: Callable[[], int], code: int, stderr: str) -> None:
    """``tunerkit ... | head`` ends in silence, with the code that shells have for a closed pipe."""
    output = opened()
    command = [sys.executable, "-m", "tunerkit_cli", "schema"]
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    os.close(output)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_a_terminal_without_a_character_gets_an_escape(outputs: Path) -> None:
    """What a record or a plugin contains never ends a command."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "tunerkit_cli", "show", str(outputs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "b\\xe9rt" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["check", "lora", "--config", "{}"], "testing"),
        (["new", "mine", "--form", "hooks"], "testing"),
        (["check-serving", "out", "--for", "vllm"], "serving"),
        (["publish", "out", "--to", "http://localhost:8000"], "serving"),
    ],
)
def test_the_commands_of_other_distributions_name_the_extra_where_it_is_missing(
    arguments: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a command of ours that is not installed is one line, whatever its options; help leaves it out."""
    monkeypatch.setattr(app, "additions", lambda: ())
    done = CliRunner().invoke(app.build(), arguments)
    assert done.exit_code == 2
    assert f"{arguments[0]} comes with tunerkit-{extra}" in done.stderr
    assert install(extra) in done.stderr
    assert not re.search(rf"^\W*{arguments[0]}\s", CliRunner().invoke(app.build(), ["--help"]).output, re.MULTILINE)
