"""Bad input: one line that says what was seen and what to do, as the page shows it."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import bad_inputs
from tests.support.bad_inputs import CASES, PAGE, row_of, shown_message

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
