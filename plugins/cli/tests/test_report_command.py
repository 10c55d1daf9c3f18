"""``tunerkit report``: records in, one file out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from plugins.cli.tests import pages, run_records
from tunerkit_cli.app import build


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build(), ["report", *map(str, arguments)])


def written(folder: Path, record: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_a_report_is_written_into_the_folder(tmp_path: Path) -> None:
    """It replaces an earlier one; its path is printed, and nothing else is left."""
    out = written(tmp_path / "out", run_records.classifier(2))
    (out / "report.html").write_text("old", encoding="utf-8")
    done = run(out)
    assert (done.exit_code, done.stdout) == (0, f"{out / 'report.html'}\n")
    assert "AdaLoRA on all-MiniLM-L6-v2" in pages.checked((out / "report.html").read_text(encoding="utf-8")).text
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "run.json"]


def test_several_runs_are_compared(tmp_path: Path) -> None:
    """Under the names that were given, in the first folder."""
    folders = [written(tmp_path / name, run_records.classifier(2)) for name in "ab"]
    done = run(*folders)
    assert (done.exit_code, done.stdout) == (0, f"{folders[0] / 'report-comparison.html'}\n")
    page = (folders[0] / "report-comparison.html").read_text(encoding="utf-8")
    assert all(str(folder) in page for folder in folders)


def test_the_file_can_be_chosen(tmp_path: Path) -> None:
    """Its folder is created."""
    out = written(tmp_path / "out", run_records.minimal())
    done = run(out, "--out", tmp_path / "deep" / "page.html")
    assert done.exit_code == 0
    pages.checked((tmp_path / "deep/page.html").read_text(encoding="utf-8"))
    assert not (out / "report.html").exists()


def test_a_report_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """It takes half a second."""
    out = written(tmp_path / "out", run_records.classifier(2))
    script = f"import sys; from tunerkit_cli.app import build; build()(['report', {str(out)!r}], standalone_mode=False)"
    script += "; print([name for name in ('torch', 'transformers', 'matplotlib', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1800, check=True)
    assert done.stdout.splitlines() == [str(out / "report.html"), "[]"]


def prepared(folder: Path) -> None:
    """Folders and files that are no runs."""
    os.mkfifo(folder / "pipe")
    written(folder / "good", run_records.minimal())
    written(folder / "damaged", run_records.minimal(steps="x"))
    written(folder / "newer", {"version": 2})
    written(folder / "list", [])
    written(folder / "parent" / "inner", run_records.minimal())
    for name, content in {
        "cut": b'{"version": 1, "task"',
        "bytes": b"\xff\xfe",
        "nan": b'{"version": 1, "task": "t", "method": "m", "steps": NaN}',
        "deep": b"[" * 100_000,
    }.items():
        (folder / name).mkdir()
        (folder / name / "run.json").write_bytes(content)
    (folder / "empty").mkdir()
    (folder / "file").touch()
    (folder / "unreadable" / "run.json").mkdir(parents=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone: no such folder; pass one that `tunerkit train --out` has written"),
        (["file"], "file: is a file; pass the folder"),
        (["empty"], "empty: has no run.json, so it is not the output folder of a finished run; pass one"),
        (
            ["parent"],
            "parent: has no run.json, so it is not the output folder of a finished run; did you mean parent/inner?",
        ),
        (["cut"], "cut/run.json: is not the JSON that `tunerkit train` writes: Expecting ':' delimiter"),
        (["bytes"], "bytes/run.json: is not the JSON that `tunerkit train` writes: 'utf-8' codec"),
        (["nan"], "nan/run.json: is not the JSON that `tunerkit train` writes: NaN is not a JSON number"),
        (["deep"], "deep/run.json: is not the JSON that `tunerkit train` writes: maximum recursion depth"),
        (["list"], "list/run.json: expected a JSON object, got a list"),
        (["unreadable"], "unreadable/run.json: is a folder, not a file; restore"),
        (["damaged"], "damaged/run.json: run.steps: expected a whole number, got 'x'"),
        (["newer"], "newer/run.json: expected a record of version 1, got version 2"),
        (["good", "damaged"], "damaged: run.steps: expected a whole number"),
        (["good", "./good"], "good: is given twice; name each run once"),
        (["good", "--out", "empty"], "--out empty: is a folder; name a file in it, such as empty/report.html"),
        (["good", "--out", "pipe"], "--out pipe: is no file but a device or a pipe, which would be replaced"),
        (["good", "--out", "x" * 300], f"{'x' * 300}: cannot be written: File name too long; choose another file"),
        (["good", "--out", "file/report.html"], "cannot write to this folder"),
    ],
)
def test_a_wrong_folder_is_one_line_of_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the folder and what to do; nothing is written."""
    prepared(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"tunerkit: {message}" if "cannot write" not in message else "tunerkit: ")
    assert message in done.stderr
    assert len(done.stderr) < 3000
    assert list(tmp_path.rglob("*.html")) == []
