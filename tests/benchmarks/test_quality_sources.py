"""The quality benchmark's rows, read from archives that a test makes."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("platformdirs", reason="the benchmark needs platformdirs")

from benchmarks.quality import sources
from benchmarks.quality.packages import Package
from benchmarks.quality.sources import Examples, rated

LINES = ("1\t2.5\tFine film.\r\n", "2\t-1.25\tBad\u2019s plot.\r\n", "3\t0.5\tSo so.\r\n", "4\t-2\tFine film.")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with four rated sentences instead of the real ones."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, "hutto_ICWSM_2014/films.txt", "".join(LINES).encode())
    file = tmp_path / "downloads" / "sentences.tar.gz"
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    package = Package("sentences", file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(sources, "SENTENCES", package)
    return tmp_path


def test_sentences_are_read_from_the_archive_in_the_archive(cache: Path) -> None:
    """Ratings beyond 0.5 are classes; the others are a third class or left out.

    A repeated text keeps its first rating.
    """
    film, plot, neutral = "Fine film.", "Bad\u2019s plot.", "So so."
    assert rated("films.txt", neutral=False)(cache) == Examples((film, plot), ("positive", "negative"))
    assert rated("films.txt", neutral=True)(cache) == Examples(
        (film, plot, neutral), ("positive", "negative", "neutral")
    )
