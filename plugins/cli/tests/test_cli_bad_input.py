"""Bad input: one line that says what was seen and what to do, as the page shows it."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugins.cli.tests import bad_inputs
from plugins.cli.tests.bad_inputs import CASES, PAGE, row_of, shown_message
from tests.support.pipes import pipe

LONGEST = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The models, data and runs that the commands name, as the working folder."""
    path = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("HF_HUB_OFFLINE", "1")
        bad_inputs.make_folder(path)
        yield path


@pytest.mark.parametrize("what", CASES)
def test_bad_input_is_one_line_that_says_what_to_do(what: str, folder: Path) -> None:
    """The exit code is 2, the only line on stderr is the page's, and nothing was trained."""
    case = CASES[what]
    for name in case.needs:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"this mistake needs {name}")
    done = bad_inputs.run(case)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("tunerkit: ")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < LONGEST
    assert not (folder / "new" / "adapter.safetensors").exists()
    assert row_of(case, shown_message(done)) in PAGE.read_text(encoding="utf-8").splitlines()


PIPES = {
    "train pipe.yaml": ": is a pipe, not a file; write the settings into a file",
    "train --model bert --data reviews.csv --config pipe.yaml": ": is a pipe, not a file; write the settings",
    "train --model bert --data pipe.csv": ": is a pipe, not a file; write the rows into a file",
    "train --model bert --data reviews.csv --eval-data pipe.parquet": ": is a pipe, not a file",
    "train --model pipe.csv --data reviews.csv": " is a pipe; pass the folder that has config.json",
    "predict run --data pipe.jsonl": ": is a pipe, not a file",
    "merge run --base pipe": " is a pipe; pass the folder that has config.json",
    "show pipe.safetensors": "holds no adapter",
    "train --from pipe.safetensors --data reviews.csv": "there is no file",
    "merge pipe.safetensors --base bert": "holds no adapter",
}


@pytest.mark.parametrize("command", PIPES)
def test_a_pipe_in_the_place_of_a_file_is_named(command: str, folder: Path) -> None:
    """Opening it would wait for ever: for who writes into it."""
    out = "--out hostile" if command.startswith(("train", "merge")) else ""
    name = next(word for word in command.split() if word.startswith("pipe"))
    with pipe(folder / name):
        done = bad_inputs.run(bad_inputs.BadInput("", f"{command} {out}"))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert name in done.stderr
    assert PIPES[command] in done.stderr


TRAIN = "train --model bert --data reviews.csv --out hostile"
LINES = {
    r"""--set 'out="a\0b"'""": "out: a path cannot contain the character NUL, got 'a\\x00b'",
    r"""--set 'eval_data=["a\0b"]' --dry-run""": "eval_data: a path cannot contain the character NUL",
    f"--set seed={'1' * 4301}": "--set seed: cannot be read as .yaml: a whole number of 4,301 characters; use at most",
    f"--config '{{rank: 0x{'f' * 4301}}}'": "--config: cannot be read as .yaml: a whole number of 4,303 characters",
    "--config '{rank: 010}'": "line 1: 010 is octal in YAML 1.1 and decimal in YAML 1.2; write the decimal number",
    "--set warmup_steps=-1:30": "line 1: -1:30 is a number to base 60 in YAML 1.1 and a text in YAML 1.2",
    "--set warmup_steps=1:30.5": "1:30.5 is a number to base 60",
    "--data digits.jsonl": "line 2 has a whole number of more than 4,300 digits; put it in quotes if it is a name",
    "--model pickled": "its weights are a pickle that is damaged or holds more than tensors; it is not read",
}


@pytest.mark.parametrize("options", LINES, ids=LINES.values())
def test_what_python_or_yaml_stumbles_over_is_one_line(options: str, folder: Path) -> None:
    """A path that no system has, numbers too long to print, numbers that mean two things, weights that are code."""
    if not (folder / "pickled").exists():
        shutil.copytree(folder / "bert", folder / "pickled")
        (folder / "pickled" / "model.safetensors").unlink()
        (folder / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    files = {"digits.jsonl": f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {"1" * 4301}}}\n'}
    done = bad_inputs.run(bad_inputs.BadInput("", f"{TRAIN} {options}", files))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert LINES[options] in done.stderr
    assert len(done.stderr) < LONGEST


def test_the_page_has_a_row_for_each_mistake_and_no_other() -> None:
    """Rows of mistakes that are gone would stay unseen otherwise."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows if not row.startswith("| mistake")] == [*CASES]


def test_the_libraries_add_nothing_that_hides_the_line(folder: Path) -> None:
    """In a process of its own, with the warnings and progress of the libraries, stderr is that line as well."""
    command = [sys.executable, "-m", "tunerkit", "predict", "run", "--base", "vit", "--text", "good"]
    path = os.pathsep.join(filter(None, (str(PAGE.parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 2
    assert "'vit' is a ViTForImageClassification" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < LONGEST


def test_a_message_of_the_longest_names_is_cut(folder: Path) -> None:
    """Columns, labels and keys of thousands of characters do not fill the terminal."""
    long = {f"{letter * 5000}": 1 for letter in "abcdefghijklmnopqrstuvwxyz"}
    cases = (
        bad_inputs.BadInput("", "train --model bert --data long.jsonl", {"long.jsonl": json.dumps(long) + "\n"}),
        bad_inputs.BadInput("", "train long.yaml", {"long.yaml": "".join(f"{name}: 1\n" for name in long)}),
        bad_inputs.BadInput(
            "",
            "train --model bert --data reviews.csv --eval-data labels.csv",
            {"labels.csv": "text,label\n" + "".join(f"film,{name}\n" for name in long)},
        ),
    )
    for case in cases:
        done = bad_inputs.run(case)
        assert done.exit_code == 2, done.output
        assert done.stderr.count("\n") == 1
        assert len(done.stderr) < LONGEST
