"""Base models by task: from a folder or the hub's cache, with a head for the labels."""

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="the models are its own")

import tunerkit  # noqa: E402
from tests.tiny_classifier import save_tiny_classifier  # noqa: E402
from tunerkit.integrations.pretrained import ModelError, load_pretrained  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_model_of_the_hub_has_its_commit_and_a_folder_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is read from the hub's cache, which this test lays out."""
    kept = tmp_path / "models--someone--small"
    save_tiny_classifier(kept / "snapshots" / COMMIT)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(name, str(tmp_path))
    assert load_pretrained("text-classification", "someone/small", labels=("a", "b")).revision == COMMIT
    assert load_pretrained("text-classification", str(kept / "snapshots" / COMMIT), labels=("a", "b")).revision is None


@pytest.mark.usefixtures("toys")
def test_the_head_is_for_the_labels_and_is_trained(tmp_path: Path) -> None:
    """A head of another size is replaced; the seed decides its start; its dropout and the pooler stay as they are."""
    folder = str(save_tiny_classifier(tmp_path))
    one, same, other = (
        load_pretrained("text-classification", folder, labels=("x", "y", "z"), seed=seed) for seed in (0, 0, 1)
    )
    weights: list[Any] = [each.model.classifier.weight for each in (one, same, other)]
    assert weights[0].shape == (3, 16)
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
    assert one.heads == ()  # it is new, which wrap sees
    tunerkit.wrap(one.model, "toy-low-rank", {})
    assert [place.path for place in tunerkit.tuner(one.model).copies] == ["classifier"]
    assert load_pretrained("text-classification", folder, labels=("x", "y")).heads == ("classifier",)
    assert one.model.config.id2label == {0: "x", 1: "y", 2: "z"}


def test_a_checkpoint_with_the_same_classes_keeps_their_order_unless_it_is_given(tmp_path: Path) -> None:
    """Its head was trained for that order; an adapter's was trained for the order in its record."""
    save_tiny_classifier(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.id2label, config.label2id = {0: "y", 1: "x"}, {"y": 0, "x": 1}
    config.save_pretrained(tmp_path)
    for labels, ordered, wanted in (
        (("x", "y"), False, {0: "y", 1: "x"}),
        (("x", "y"), True, {0: "x", 1: "y"}),
        (("x", "z"), False, {0: "x", 1: "z"}),
        (("x", "y", "z"), False, {0: "x", 1: "y", 2: "z"}),
    ):
        loaded = load_pretrained("text-classification", str(tmp_path), labels=labels, ordered=ordered)
        assert loaded.model.config.id2label == wanted
        assert loaded.model.config.label2id == {name: number for number, name in wanted.items()}


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path) -> None:
    """A folder that is missing, a file, and a folder without a model."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for source, words in (
        (str(tmp_path / "gone"), "no such folder"),
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "empty"), "no config.json"),
    ):
        with pytest.raises(ModelError, match=words) as raised:
            load_pretrained("text-classification", source)
        assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match="did you mean 'regression'"):
        load_pretrained("regresion", "anything")
