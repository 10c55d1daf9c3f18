"""Write files completely or not at all, and remove what killed writers left: their files and scratch folders."""

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

_BINARY, _NOT_A_LINK = vars(os).get("O_BINARY", 0), vars(os).get("O_NOFOLLOW", 0)  # Windows has the first alone
_OLDER = "older"  # in a scratch folder
# Some file systems keep locks to one machine. So a writer judges only the leftovers of its own machine.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOTSUP, errno.EISDIR})


def replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file under a temporary name, flush it to disk, rename it, and flush its folder.

    A file that is replaced keeps its mode; a new one follows the umask. Missing folders are created.

    Several writers of one path do not disturb each other: each has its own temporary file and a lock on it. The kernel
    releases the lock of a writer that was killed. The next writer then finds the file unlocked and removes it.

    Raises `FileError` if it cannot be written, and an older one is unchanged; or if only the folder could not be
    flushed, and the message says that the new file is there.
    """
    try:
        missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        _create_folder(path)
        _remove_leftovers(path)
        _replace(path, parts)
    except FileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the path cannot be encoded
        raise FileError(f"cannot write {path}: {reason(error)}; an older file there is unchanged") from error
    try:
        for folder in (path.parent, *(folder.parent for folder in missing)):
            sync(folder)
    except OSError as error:
        raise FileError(
            f"{path} is written, but its folder could not be flushed to disk: {reason(error)}; a power failure "
            "may bring back what was there before, so write it again"
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
            f"cannot write {path}: {problem}. Pass another folder, in which you may create files, or the path of the "
            f"file to write, which ends in {path.suffix}"
        ) from error


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers of ``path`` that were killed."""
    names = []
    with suppress(OSError):  # one may write into a folder that one may not list
        names = os.listdir(path.parent)
    for left in [path.with_name(name) for name in names if name.startswith(_prefix(path)) and name.endswith(".tmp")]:
        # Opened to be written: network file systems lock no other file.
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
            os.chmod(temporary, mode)  # the umask has restricted it further
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
        os.close(lock)


def _create(path: Path, mode: int) -> tuple[Path, int, int]:
    """Create a temporary file beside ``path``; its path, a descriptor to write to, and one that holds the lock."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode)
        lock = os.dup(number)
        # Another writer may have taken it for a leftover before it was locked, and removed it.
        if try_lock(lock) is not False and os.fstat(lock).st_nlink:
            return temporary, number, lock
        os.close(number)
        os.close(lock)


def _prefix(path: Path) -> str:
    # Cut, so that a long name has a temporary name too. The lock protects files that share a prefix.
    return f".{path.name[:50]}.{_HOST}."


def move(moves: Mapping[Path, Path], scratch: Path) -> None:
    """Move files out of a `scratch_in` to their places: all, or none. Each takes the mode of the file it replaces.

    One file is replaced in one step. Of several, the older ones are set aside first: see `put_back`.
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
    os.rename(older, scratch / "replaced")  # whoever finds the scratch folder later has nothing to put back


def put_back(left: Path) -> None:
    """Put back the files that `move` had set aside in a scratch folder, also that of a process that was killed."""
    for file in sorted((left / _OLDER).glob("*")):
        os.replace(file, left.parent / file.name)


@contextmanager
def scratch_in(
    folder: Path, prefix: str, *, recover: Callable[[Path], None] = lambda left: None, refuse: Exception | None = None
) -> Iterator[Path]:
    """Yield a scratch folder, which is removed at the end; first remove those of processes that were killed.

    ``prefix`` begins with a dot, and only folders with the same one are looked at. ``recover`` is called with one that
    a killed process left, before it is removed. ``refuse`` is raised if another process is using one now.
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
            # Another process may have taken it for a leftover before it was locked.
            if is_mine is not False and os.path.isdir(scratch.name):
                yield Path(scratch.name)
                return


@contextmanager
def locked(path: Path, flags: int = os.O_RDONLY) -> Iterator[bool | None]:
    """Lock a file or folder, and yield whether it is locked. False: another one holds the lock. None: no locks here."""
    try:
        number = os.open(path, flags)
    except OSError:  # it is gone; or this is Windows, where no folder can be opened
        yield None
        return
    try:
        yield try_lock(number)
    finally:
        os.close(number)


def try_lock(number: int) -> bool | None:
    """Lock an open file or folder for this process, and return what `locked` yields."""
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
    """Flush a file, or a folder's entries, to disk, where the system can do that."""
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
    """The text of an error without its number and path, which a message names itself."""
    return str((error.strerror if isinstance(error, OSError) else None) or error)
