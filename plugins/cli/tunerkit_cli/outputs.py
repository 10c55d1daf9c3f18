"""The output folder: every file in it is complete or absent."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tunerkit import TunerkitError


class OutputError(TunerkitError):
    """The output folder cannot be written to."""


def prepare(folder: Path) -> None:
    """Create ``folder`` and check that it is writable, before hours of training. Raises `OutputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise OutputError(f"--out {folder}: cannot write to this folder: {problem.strerror}") from problem


@contextmanager
def claimed(folder: Path, *, keep: bool = True) -> Iterator[None]:
    """Create a writable folder and lock it; if the block fails, or without ``keep``, it is removed if it is empty."""
    from tunerkit import serialization  # imports torch, which `tunerkit --help` does not need

    with _removing_empty(folder, keep=keep):
        prepare(folder)
        # It leaves no file, and the kernel releases that of a process that was killed. Some network systems have none.
        with serialization.locked(folder) as is_mine:
            if is_mine is False:
                do = "wait until it has ended, or pass another folder"
                raise OutputError(f"--out {folder}: another process is training into this folder; {do}")
            yield


@contextmanager
def _removing_empty(folder: Path, *, keep: bool = True) -> Iterator[None]:
    """If the block fails, remove the folder and those above it that it created, where they are empty."""
    created, has_ended = [each for each in (folder, *folder.parents) if not os.path.lexists(each)], False
    try:
        yield
        has_ended = True
    finally:
        for each in () if has_ended and keep else created:
            with suppress(OSError):  # it is not empty, or was never created
                each.rmdir()


@contextmanager
def scratch_beside(folder: Path, name: str, *, alone: bool = False) -> Iterator[Path]:
    """Yield a scratch folder in ``folder``; with ``alone``, refuse if another process has one of this name."""
    from tunerkit import serialization

    busy = OutputError(
        f"--out {folder / name}: another process is writing this folder; wait until it has ended, or pass another "
        "folder"
    )
    with serialization.scratch_in(folder, f".writing-{name[:50]}-", refuse=busy if alone else None) as scratch:
        yield scratch


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside the block, what libraries raise where a file cannot be written, as on a full disk, is an `OutputError`."""
    try:
        yield
    except Exception as problem:
        # The tokenizers library raises Exception itself.
        if not isinstance(problem, OSError | SafetensorError) and type(problem) is not Exception:
            raise
        reason = (problem.strerror if isinstance(problem, OSError) else None) or " ".join(str(problem).split())
        raise OutputError(f"--out {folder}: cannot be written: {reason}; free some disk space") from problem


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder, which becomes the new ``folder`` at the end; if the block fails, nothing is left."""
    with _removing_empty(folder.parent):
        prepare(folder.parent)
        if folder.is_dir():
            prepare(folder)
        with scratch_beside(folder.parent, folder.name, alone=True) as scratch:
            whole = scratch / "whole"  # the scratch folder itself is closed to other users
            whole.mkdir()
            with writing(folder):
                yield whole
            if os.path.isdir(folder):
                whole.chmod(stat.S_IMODE(folder.stat().st_mode))
            try:
                if folder.exists() and folder.samefile("."):
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                whole.rename(folder)  # in one step, also in place of an empty folder
            except OSError:
                if not folder.is_dir() or any(folder.iterdir()):
                    raise OutputError(f"--out {folder}: is not empty any more; pass a new folder") from None
                for file in sorted(whole.iterdir()):  # the working folder, or another file system's
                    shutil.move(file, folder / file.name)
