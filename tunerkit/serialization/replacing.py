"""Replace one file, completely or not at all, and remove what killed writers left beside it."""

import contextlib
import errno
import hashlib
import os
import platform
import secrets
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from tunerkit.errors import FileError

try:
    import fcntl
except ImportError:  # on Windows, leftovers stay
    fcntl = None  # type: ignore[assignment]

if sys.platform == "win32":
    _BINARY, _NOT_A_LINK = os.O_BINARY, 0
else:
    _BINARY, _NOT_A_LINK = 0, os.O_NOFOLLOW
# Some file systems keep locks to one machine. So a writer judges only the leftovers of its own machine.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOTSUP, errno.EISDIR})


def replace(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file under a temporary name, flush it to disk, rename it, and flush its folder.

    A file that is replaced keeps its mode; a new one follows the umask. Missing folders are created.

    Several writers of one path do not disturb each other: each has its own temporary file and a lock on it. The kernel
    releases the lock of a writer that was killed. The next writer then finds the file unlocked and removes it.

    Args:
        path: The file.
        parts: Its content.

    Raises:
        FileError: The file cannot be written; an older one is unchanged. Or only the folder could not be flushed: the
            new file is there then, as the message says.
    """
    try:
        folders = _folders_tosync(path)
        _create_folder(path)
        _remove_leftovers(path)
        _replace(path, parts)
    except FileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the path cannot be encoded
        raise FileError(f"cannot write {path}: {_reason(error)}; an older file there is unchanged") from error
    try:
        for folder in folders:
            sync(folder)
    except OSError as error:
        raise FileError(
            f"{path} is written, but its folder could not be flushed to disk: {_reason(error)}; a power failure "
            "may bring back what was there before, so write it again"
        ) from error


def _create_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((above for above in (path.parent, *path.parent.parents) if os.path.exists(above)), None)
        if file is not None and not file.is_dir():
            raise FileError(
                f"cannot write {path}: {file} is a file and not a folder. Pass another folder, or the path of the file "
                f"to write, which ends in {path.suffix}"
            ) from error
        raise FileError(
            f"cannot write {path}: the folder {path.parent} cannot be created: {_reason(error)}. Pass a folder in "
            "which you may create files"
        ) from error


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
        with contextlib.suppress(OSError):
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


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers of ``path`` that were killed."""
    prefix, names = _prefix(path), []
    with contextlib.suppress(OSError):  # one may write into a folder that one may not list
        names = os.listdir(path.parent)
    for name in names:
        if name.startswith(prefix) and name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                _remove_unlocked(path.with_name(name))


def _remove_unlocked(leftover: Path) -> None:
    number = os.open(leftover, os.O_RDWR | _NOT_A_LINK)
    try:
        if try_lock(number):
            leftover.unlink()
    finally:
        os.close(number)


def try_lock(number: int) -> bool | None:
    """Lock an open file or folder for this process. False: another one holds the lock. None: there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _prefix(path: Path) -> str:
    # Cut, so that a long name has a temporary name too. The lock protects files that share a prefix.
    return f".{path.name[:50]}.{_HOST}."


def _folders_tosync(path: Path) -> list[Path]:
    """The folder of ``path``, and the parents of the folders that must be created for it."""
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    return [path.parent, *(folder.parent for folder in missing)]


def sync(folder: Path) -> None:
    """Flush a file, or a folder's entries, to disk, where the system can do that."""
    try:
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def _reason(error: OSError | ValueError) -> str:
    return str((error.strerror if isinstance(error, OSError) else None) or error)
