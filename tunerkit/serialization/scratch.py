"""Scratch folders that are locked while they are used, so that those of processes that were killed can be removed."""

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tunerkit.serialization.replacing import try_lock


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder, and yield whether it is locked. False: another one holds the lock. None: there are no locks."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # it is gone; or this is Windows, where no folder can be opened
        yield None
        return
    try:
        yield try_lock(number)
    finally:
        os.close(number)


@contextmanager
def scratch_in(
    folder: Path, prefix: str, *, recover: Callable[[Path], None] | None = None, refuse: Exception | None = None
) -> Iterator[Path]:
    """Yield a scratch folder, which is removed at the end; first remove those of processes that were killed.

    Args:
        folder: Where to create it.
        prefix: How its name begins: with a dot. Only those with the same prefix are looked at.
        recover: Called with one that a killed process left, before it is removed.
        refuse: What to raise if another process is using one now; None if both may.
    """
    for left in folder.glob(f"{glob.escape(prefix)}*"):
        with locked(left) as is_left:
            if is_left and not left.is_symlink():
                if recover is not None:
                    recover(left)
                shutil.rmtree(left, ignore_errors=True)
        if refuse is not None and is_left is False:
            raise refuse
    while True:
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=prefix, ignore_cleanup_errors=True)
        with scratch, locked(Path(scratch.name)) as is_mine:
            # Another process may have taken it for a leftover before it was locked.
            if is_mine is not False and os.path.isdir(scratch.name):
                yield Path(scratch.name)
                return
