"""The quality benchmark's downloads: pinned, checked, and kept in a cache."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

pytest.importorskip("platformdirs", reason="the benchmark needs platformdirs")

from benchmarks.quality.packages import APT, NPM, PIP, Package, PackageError, downloaded

RIGHT = Package("words==1.0", "words.tar.gz", hashlib.sha256(b"right").hexdigest())


def command_that_brings(content: bytes | None) -> Callable[..., Any]:
    """Replaces `subprocess.run`: writes a file with that content, or fails."""

    def run(command: list[str], *, cwd: Path, **_: object) -> Any:
        if content is not None:
            (cwd / RIGHT.file).write_bytes(content)
        return attrs.make_class("Done", ["returncode", "stderr"])(content is None, "first\nERROR: no network\n")

    return run


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_a_cached_file_is_used_without_a_download_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run needs no network; a file that has changed is rejected, and the error says what to do."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked pip"))
    file = tmp_path / "downloads" / RIGHT.file
    file.parent.mkdir()
    file.write_bytes(b"right")
    assert downloaded(RIGHT, PIP, tmp_path) == file
    file.write_bytes(b"right, and more")
    with pytest.raises(PackageError, match=r"SHA-256 is .* delete the file"):
        downloaded(RIGHT, PIP, tmp_path)


def test_a_download_is_checked_before_it_enters_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download is kept if its digest is right; otherwise the cache stays empty."""
    monkeypatch.setattr(subprocess, "run", command_that_brings(b"wrong"))
    with pytest.raises(PackageError, match="SHA-256"):
        downloaded(RIGHT, PIP, tmp_path)
    assert files_in(tmp_path) == []
    monkeypatch.setattr(subprocess, "run", command_that_brings(b"right"))
    assert downloaded(RIGHT, PIP, tmp_path).read_bytes() == b"right"
    assert files_in(tmp_path) == [RIGHT.file]


def test_a_failed_download_says_why_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the command's last line and the file to provide by hand. A missing command is named."""
    monkeypatch.setattr(subprocess, "run", command_that_brings(None))
    with pytest.raises(PackageError, match=r"words==1.0 .*: no network. Put words.tar.gz into .*downloads by hand"):
        downloaded(RIGHT, PIP, tmp_path)
    monkeypatch.undo()
    with pytest.raises(PackageError, match=r"with no-such-command: .*No such file"):
        downloaded(RIGHT, ("no-such-command",), tmp_path)


@pytest.mark.parametrize(("command", "last"), [(NPM, RIGHT.requirement), (APT, RIGHT.requirement), (PIP, "wanted.txt")])
def test_a_command_asks_for_the_pinned_version(
    command: tuple[str, ...], last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is in its arguments or in pip's file with the digest, which pip checks before it builds anything."""
    asked: list[str] = []

    def run(command: list[str], *, cwd: Path, **_: object) -> Any:
        asked.extend(command)
        asked.append((cwd / "wanted.txt").read_text())
        return command_that_brings(b"right")(command, cwd=cwd)

    monkeypatch.setattr(subprocess, "run", run)
    downloaded(RIGHT, command, tmp_path)
    assert asked == [*command[:-1], last, f"words==1.0 --hash=sha256:{RIGHT.sha256}\n"]
    assert command is not PIP or "--require-hashes" in asked
