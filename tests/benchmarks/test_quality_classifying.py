"""The quality benchmark's sentence classifier: its classes, its rows, its new head."""

from pathlib import Path

import pytest
import torch

from tests.support.quality_needs import skip_without_what_quality_needs

skip_without_what_quality_needs()

from transformers import AutoModel  # noqa: E402

from benchmarks.quality import minilm  # noqa: E402
from benchmarks.quality.classifying import SentenceRows, load_classifier  # noqa: E402
from benchmarks.quality.sources import Examples  # noqa: E402
from tests.support.tiny_classifier import save_tiny_classifier  # noqa: E402

PARTS = [Examples(("good film", "bad plot", "the film"), ("b", "c", "a")), Examples(("very good film",), ("c",))]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache with a tiny model instead of the real one."""
    folder = save_tiny_classifier(tmp_path / "tiny")
    AutoModel.from_pretrained(folder).save_pretrained(folder)  # without a head, as the real one
    monkeypatch.setattr(minilm, "folder", lambda cache: folder)
    return tmp_path


def test_a_label_is_its_place_among_the_training_labels(cache: Path) -> None:
    """Labels are in alphabetical order in every part; texts are truncated to the allowed length."""
    model, (train, test) = load_classifier(PARTS, cache, seed=0, max_length=4)
    assert model.get_submodule("classifier").get_parameter("weight").shape[0] == 3
    assert (train.labels, test.labels) == ((1, 2, 0), (2,))
    assert (train.lengths, test.lengths) == ([4, 4, 4], [4])


def test_a_label_that_training_never_saw_is_an_error(cache: Path) -> None:
    """It would be scored as another class."""
    with pytest.raises(KeyError, match="d"):
        load_classifier([*PARTS, Examples(("bad film",), ("d",))], cache, seed=0, max_length=4)


def test_the_seed_draws_the_head_alone(cache: Path) -> None:
    """The same seed gives the same head; the pretrained part is the same with every seed."""
    first, again, other = (load_classifier(PARTS, cache, seed=seed, max_length=4)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert {name for name, tensor in first.items() if not torch.equal(tensor, other[name])} == {"classifier.weight"}


def test_rows_are_batched_with_their_labels() -> None:
    """Rows come in the requested order; padding is masked."""
    batch = SentenceRows(ids=((5, 6, 7), (8,)), labels=(1, 0), padding=9).batch([1, 0])
    assert batch["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
