"""What the files of a run state: the paths in them, and what is in the place of a file."""

import ntpath
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.pipes import pipe
from tunerkit_transformers import run_folder
from tunerkit_transformers.run_folder import RunError, irregular, placed, read_record, stated


def test_a_path_is_stated_without_the_home_folder_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the run's folder it moves with it; below the home folder it is another user's too; others are kept."""
    home, run = tmp_path / "me", tmp_path / "me" / "runs" / "a"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(home)
    for name in (home, tmp_path / "link"):  # the name of a home folder may be a link
        monkeypatch.setenv("HOME", str(name))
        said: dict[str, str | None] = {
            str(run / "base"): "./base",
            str(home / "data.csv"): "~/data.csv",
            str(run): "~/runs/a",
        }
        said |= dict.fromkeys((str(tmp_path / "mean" / "x"), "org/name", "data.csv", "~"), None)
        for path, wanted in said.items():
            assert stated(path, run) == (wanted or path)
            assert os.path.realpath(placed(stated(path, run), run)) == os.path.realpath(os.path.expanduser(path))
    moved = run.rename(tmp_path / "b")
    assert placed("./base", moved) == str(moved / "base")
    monkeypatch.setenv("HOME", os.sep)
    assert stated("/data/x", moved) == "/data/x"


def test_a_path_of_windows_is_stated_with_slashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is found again on another system. Capitals, which Windows ignores, do not give the home folder away."""
    monkeypatch.setenv("USERPROFILE", r"C:\Users\Me")
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "os", SimpleNamespace(path=ntpath, sep=ntpath.sep))
        run: Any = r"C:\Users\Me\runs\a"  # a `Path` is one of this system
        for path in (r"c:\users\me\x\y", "C:/Users/Me/x/y"):
            assert stated(path, run) == "~/x/y"
        assert stated(r"c:\users\me\RUNS\a\base", run) == "./base"
        assert stated(r"c:\users\meant\x", run) == r"c:\users\meant\x"
        assert ntpath.normpath(placed("./base/b", run)) == r"C:\Users\Me\runs\a\base\b"
    assert placed(r".\base\b", Path("/run")) == "/run/base/b"
    assert placed(r"~\b", Path("/run")) == os.path.expanduser("~/b")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    """A file is read, and what is absent is reported by whoever opens it."""
    (tmp_path / "file").touch()
    (tmp_path / "device").symlink_to(os.devnull)
    with pipe(tmp_path / "run.json") as path:
        assert irregular(path) == "a pipe"
        with pytest.raises(RunError, match=r"run\.json: is a pipe, not a file; restore what"):
            read_record(tmp_path)
    assert irregular(tmp_path) == "a folder"
    assert irregular(tmp_path / "device") == "a device or a socket"
    assert [irregular(Path(each)) for each in (tmp_path / "file", tmp_path / "absent", "a\0b", "x" * 5000)] == [
        None
    ] * 4
