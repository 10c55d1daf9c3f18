"""The output folder: every file in it is complete or not there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunerkit.errors import TunerkitError


class OutputError(TunerkitError):
    """The output folder cannot be written to."""


def prepare(folder: Path) -> None:
    """Make ``folder`` before hours are spent on what goes into it. Raises `OutputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise OutputError(f"--out {folder}: cannot write there: {problem.strerror}") from problem


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files move into ``folder`` at the end of the block, or vanish if the block fails."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(folder / file.name)
