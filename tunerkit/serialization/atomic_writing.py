"""Write files atomically, and remove the temporary files and scratch folders of killed processes."""

import errno
import glob
import hashlib
import os
import platform
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tunerkit.errors import FileError

try:
    import fcntl
except ImportError:  # on Windows, leftovers stay
    fcntl = None  # type: ignore[assignment]

_BINARY, _NOT_A_LINK = vars(os).get("O_BINARY", 0), vars(os).get("O_NOFOLLOW", 0)  # Windows has only the first
_OLDER = "older"  # the subfolder of a scratch folder for files that are being replaced
# Some file systems do not share locks between machines, so a writer removes only leftovers of its own machine.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOTSUP, errno.EISDIR})


def replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file atomically: write a temporary file, flush it to disk, rename it, and flush the folder.

    A replaced file keeps its mode; a new file follows the umask. Missing folders are created.

    Concurrent writers do not interfere: each locks its own temporary file. The kernel releases the lock of a killed
    writer, so the next writer finds its file unlocked and removes it.

    Raises `FileError`. If the write failed, an older file is unchanged. If only the flush of the folder failed, the new
    file is in place.
    """
    try:
        missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        _create_folder(path)
        _remove_leftovers(path)
        _replace(path, parts)
    except FileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the path cannot be encoded
        raise FileError(f"cannot write {path}: {reason(error)}; a file that was there is unchanged") from error
    try:
        for folder in (path.parent, *(folder.parent for folder in missing)):
            sync(folder)
    except OSError as error:
        raise FileError(
            f"{path} is written, but its folder could not be flushed to disk: {reason(error)}; a power failure "
            "may restore the previous content, so write it again"
        ) from error


def _create_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        nearest = next((above for above in path.parents if os.path.exists(above)), None)
        problem = f"the folder {path.parent} cannot be created: {reason(error)}"
        if nearest is not None and not nearest.is_dir():
            problem = f"{nearest} is a file and not a folder"
        raise FileError(
            f"cannot write {path}: {problem}. Pass a folder in which you may create files, or the path of a file that "
            f"ends in {path.suffix}"
        ) from error


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed writers of ``path`` left behind."""
    names = []
    with suppress(OSError):  # a folder may be writable and not readable
        names = os.listdir(path.parent)
    for left in [path.with_name(name) for name in names if name.startswith(_prefix(path)) and name.endswith(".tmp")]:
        # Opened for writing, since network file systems lock no other file.
        with suppress(OSError), locked(left, os.O_RDWR | _NOT_A_LINK) as is_left:
            if is_left:
                left.unlink()


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    mode = stat.S_IMODE(path.stat().st_mode) & 0o777 if path.exists() else None
    temporary, number, lock = _create(path, 0o666 if mode is None else mode)
    try:
        with open(number, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)  # the umask has restricted the mode
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
        os.close(lock)


def _create(path: Path, mode: int) -> tuple[Path, int, int]:
    """Create a temporary file beside ``path``; return its path, a descriptor for writing, and one for the lock."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode)
        lock = os.dup(number)
        # Another writer may have removed it as a leftover before it was locked.
        if try_lock(lock) is not False and os.fstat(lock).st_nlink:
            return temporary, number, lock
        os.close(number)
        os.close(lock)


def _prefix(path: Path) -> str:
    # Truncated, since file systems limit the length of a name. Locks protect files that share a prefix.
    return f".{path.name[:50]}.{_HOST}."


def move(moves: Mapping[Path, Path], scratch: Path) -> None:
    """Move files from a scratch folder to their destinations, all or none; each gets the mode of the file it replaces.

    A single file is replaced atomically. For several, the older files are set aside first: see `put_back`.
    """
    for file, new in moves.items():
        if new.is_file():
            file.chmod(stat.S_IMODE(new.stat().st_mode) & 0o777)
    taken = [new for new in moves.values() if len(moves) > 1 and os.path.lexists(new)]
    older = scratch / _OLDER
    older.mkdir()
    with ExitStack() as undo:
        undo.callback(put_back, scratch)
        for new in set(moves.values()).difference(taken) if len(moves) > 1 else ():
            undo.callback(new.unlink, missing_ok=True)
        for new in taken:
            os.replace(new, older / new.name)
        for file, new in moves.items():
            os.replace(file, new)
        undo.pop_all()
    os.rename(older, scratch / "replaced")  # so that a later `put_back` does not restore them


def put_back(left: Path) -> None:
    """Restore the files that an interrupted `move` set aside in the scratch folder ``left``."""
    for file in sorted((left / _OLDER).glob("*")):
        os.replace(file, left.parent / file.name)


@contextmanager
def scratch_in(
    folder: Path, prefix: str, *, recover: Callable[[Path], None] = lambda left: None, refuse: Exception | None = None
) -> Iterator[Path]:
    """Yield a temporary scratch folder, after removing the scratch folders that killed processes left behind.

    ``prefix`` begins with a dot; only folders with this prefix are examined. ``recover`` is called with each leftover
    folder before its removal. ``refuse`` is raised if another process is using a scratch folder now.
    """
    for left in folder.glob(f"{glob.escape(prefix)}*"):
        with locked(left) as is_left:
            if is_left and not left.is_symlink():
                recover(left)
                shutil.rmtree(left, ignore_errors=True)
        if refuse is not None and is_left is False:
            raise refuse
    while True:
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=prefix, ignore_cleanup_errors=True)
        with scratch, locked(Path(scratch.name)) as is_mine:
            # Another process may have removed it as a leftover before it was locked.
            if is_mine is not False and os.path.isdir(scratch.name):
                yield Path(scratch.name)
                return


@contextmanager
def locked(path: Path, flags: int = os.O_RDONLY) -> Iterator[bool | None]:
    """Lock a file or folder; yield True, False if another process holds the lock, or None if locks do not work here."""
    try:
        number = os.open(path, flags)
    except OSError:  # the path is gone; or it is a folder on Windows, which cannot be opened
        yield None
        return
    try:
        yield try_lock(number)
    finally:
        os.close(number)


def try_lock(number: int) -> bool | None:
    """Try to lock an open descriptor; return True, False if it is locked already, or None if locks do not work."""
    try:
        if fcntl is not None:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:
        pass
    return None


def sync(path: Path) -> None:
    """Flush a file or a folder to disk, if the system supports it."""
    try:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def reason(error: OSError | ValueError) -> str:
    """Return an error's text without errno and path, since tunerkit's messages name the path."""
    return str((error.strerror if isinstance(error, OSError) else None) or error)
