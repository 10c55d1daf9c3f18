"""The output folder: every file in it is complete or absent."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def require_writable(folder: Path) -> None:
    """Check that `prepare` would succeed, without creating anything. Raises `OutputError`."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    problem = None if nearest.is_dir() else errno.EEXIST if nearest == folder else errno.ENOTDIR
    if problem is None and not os.access(nearest, os.W_OK | os.X_OK):
        problem = errno.EACCES
    if problem is not None:
        raise OutputError(f"--out {folder}: cannot write to this folder: {os.strerror(problem)}")


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder. At the end its files move into ``folder``; if the block fails, they are deleted."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(folder / file.name)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder, which becomes ``folder`` at the end; if the block fails, nothing of it is left.

    ``folder`` is new or empty. Raises `OutputError` before the block if it cannot be written.
    """
    prepare(folder.parent)
    if folder.is_dir():
        prepare(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
        whole = Path(scratch) / "whole"  # the scratch folder itself is closed to other users
        whole.mkdir()
        yield whole
        if not folder.is_dir():
            whole.rename(folder)
            return
        for file in sorted(whole.iterdir()):  # an empty folder may be another file system's, or the working folder
            shutil.move(file, folder / file.name)
