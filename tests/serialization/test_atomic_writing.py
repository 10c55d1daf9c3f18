"""A file is replaced completely or not at all, keeps its mode, and killed writers leave nothing behind."""

import errno
import multiprocessing
import os
import signal
import stat
import threading
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tunerkit.errors import FileError
from tunerkit.serialization import atomic_writing
from tunerkit.serialization.atomic_writing import replace

posix = pytest.mark.skipif(atomic_writing.fcntl is None, reason="needs file locks")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    """A file that only its owner may read stays so, and the content is never readable by others meanwhile."""
    path = tmp_path / "a.safetensors"
    seen: list[int] = []
    path.write_bytes(b"old")
    path.chmod(mode)

    def parts() -> Iterator[bytes]:
        seen.extend(stat.S_IMODE(found.stat().st_mode) for found in tmp_path.glob("*.tmp"))
        seen.extend(stat.S_IMODE(found.stat().st_mode) for found in tmp_path.glob(".*.tmp"))
        yield b"new"

    replace(path, parts())
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert seen
    assert all(found & ~mode == 0 for found in seen)


def _write_slowly(path: Path, started: Event) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        started.set()
        signal.pause()

    replace(path, parts())


@posix
def test_the_next_writer_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    """The temporary file of a dead process is removed, and the old file is complete until then."""
    path = tmp_path / "a.safetensors"
    replace(path, [b"old"])
    context = multiprocessing.get_context("fork")
    started = context.Event()
    writer = context.Process(target=_write_slowly, args=(path, started))
    writer.start()
    assert started.wait(120)
    replace(path, [b"meanwhile"])
    assert len(list(tmp_path.iterdir())) == 2  # the file of the living writer is left alone
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert len(list(tmp_path.iterdir())) == 2
    replace(path, [b"new"])
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a.safetensors", b"new")]


@posix
def test_other_files_are_left_alone(tmp_path: Path) -> None:
    """Only leftovers of the same name and machine are removed: no other program's, and no folder."""
    kept = [".a.safetensors.tmp", "a.safetensors.tmp", ".b.safetensors.0.tmp", ".a.safetensors.elsewhere.1.tmp"]
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    prefix = f".a.safetensors.{atomic_writing._HOST}."
    (tmp_path / f"{prefix}folder.tmp").mkdir()
    (tmp_path / f"{prefix}dead.tmp").write_bytes(b"left")
    (tmp_path / f"{prefix}link.tmp").symlink_to(tmp_path / kept[0])
    replace(tmp_path / "a.safetensors", [b"new"])
    left = {found.name for found in tmp_path.iterdir()}
    assert left == {*kept, "a.safetensors", f"{prefix}folder.tmp", f"{prefix}link.tmp"}


def test_writers_at_the_same_time_end_with_the_file_of_one_of_them(tmp_path: Path) -> None:
    """None fails, a reader never sees a part of a file, and nothing else is left."""
    path = tmp_path / "a.safetensors"
    contents = [bytes([number]) * 100_000 for number in range(4)]
    replace(path, [contents[0]])
    failed: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(20):
                replace(path, [content[:50_000], content[50_000:]])
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    assert failed == []
    assert [found.name for found in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_writer_whose_file_is_taken_for_a_leftover_takes_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer may remove the temporary file before it is locked: that one is not written to."""
    path, lock = tmp_path / "a.safetensors", atomic_writing.try_lock
    removed: list[Path] = []

    def remove_first(number: int) -> bool | None:
        if not removed:
            removed.extend(tmp_path.glob(".*.tmp"))
            removed[0].unlink()
        return lock(number)

    monkeypatch.setattr(atomic_writing, "try_lock", remove_first)
    replace(path, [b"new"])
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a.safetensors", b"new")]
    assert len(removed) == 1


def test_folders_are_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file is moved within its folder, which is then flushed, and so are the parents of new folders."""
    happened: list[str] = []
    fsync, move = os.fsync, os.replace

    def note(number: int) -> None:
        kind = os.fstat(number)
        if stat.S_ISDIR(kind.st_mode):
            known = {
                os.stat(found).st_ino: found.name for found in (tmp_path, tmp_path / "new", tmp_path / "new" / "er")
            }
            happened.append(known[kind.st_ino])
        else:
            happened.append("file")
        fsync(number)

    def moved(source: Path, target: Path) -> None:
        assert (source.parent, source.read_bytes()) == (target.parent, b"new")
        move(source, target)
        happened.append("rename")

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", moved)
    replace(tmp_path / "new" / "er" / "a.safetensors", [b"new"])
    assert happened[:2] == ["file", "rename"]
    assert set(happened[2:]) == {"er", "new", tmp_path.name}


@pytest.mark.parametrize(("number", "told"), [(errno.EIO, True), (errno.EINVAL, False), (errno.EACCES, False)])
def test_a_folder_that_cannot_be_flushed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: bool
) -> None:
    """A failing disk is an error that says that the new file is there; a file system without this is no error."""
    fsync = os.fsync

    def fail(opened: int) -> None:
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", fail)
    path = tmp_path / "a.safetensors"
    if told:
        with pytest.raises(FileError, match="is written, but its folder could not be flushed"):
            replace(path, [b"new"])
    else:
        replace(path, [b"new"])
    assert path.read_bytes() == b"new"


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path: Path) -> None:
    """The temporary name is not longer than the file's own."""
    path = tmp_path / f"{'ä' * 121}.safetensors"
    replace(path, [b"new"])
    assert path.read_bytes() == b"new"


def test_a_folder_that_may_not_be_listed_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leftovers are then not looked for."""

    def refuse(folder: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    replace(tmp_path / "a.safetensors", [b"new"])
    assert (tmp_path / "a.safetensors").read_bytes() == b"new"


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is known of leftovers, and they stay."""
    path = tmp_path / "a.safetensors"
    left = tmp_path / f".a.safetensors.{atomic_writing._HOST}.0.tmp"
    left.write_bytes(b"left")
    monkeypatch.setattr(atomic_writing, "try_lock", lambda number: None)
    replace(path, [b"new"])
    assert {found.name for found in tmp_path.iterdir()} == {left.name, path.name}


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    """Where a folder should be there is a file: the error says which, and what to pass. Nothing older is there."""
    (tmp_path / "file").write_bytes(b"own")
    for path in (tmp_path / "file" / "a.safetensors", tmp_path / "file" / "b" / "a.safetensors"):
        with pytest.raises(FileError, match=r"file is a file and not a folder\. Pass a folder") as caught:
            replace(path, [b"new"])
        assert "older file" not in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"own"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
def test_a_folder_that_cannot_be_created_is_named() -> None:
    """Linux allows nobody to create a folder there."""
    with pytest.raises(FileError, match=r"the folder /proc/none cannot be created.*Pass a folder in which you"):
        replace(Path("/proc/none/a.safetensors"), [b"new"])
