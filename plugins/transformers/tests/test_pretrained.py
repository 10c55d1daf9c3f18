"""Base models by task: from a folder or the hub's cache, with a head for the labels."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

import tunerkit
from tests.support.tiny_classifier import save_tiny_classifier
from tunerkit_transformers.bases import Base, refusing
from tunerkit_transformers.pretrained import ModelError, is_path, load_pretrained

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


@pytest.mark.usefixtures("toys")
def test_the_head_of_a_timm_model_is_trained_as_others_are(tmp_path: Path) -> None:
    """It lies inside of what transformers takes for the pretrained part, and its processor in the model's config."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    known = timm.create_model("test_vit", num_classes=2).pretrained_cfg
    settings: dict[str, Any] = {"num_labels": 2, "pretrained_cfg": known}
    config = transformers.TimmWrapperConfig(architecture="test_vit", **settings)
    transformers.TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "vit")
    task, folder = "image-classification", str(tmp_path / "vit")
    assert load_pretrained(task, folder, labels=("x", "y")).heads == ("timm_model.head",)
    other = load_pretrained(task, folder, labels=("x", "y", "z"), processor_from=tmp_path)
    assert other.heads == ()  # it is new, which wrap sees
    tunerkit.wrap(other.model, "toy-low-rank", {})
    assert [place.path for place in tunerkit.tuner(other.model).copies] == ["timm_model.head"]
    assert other.processor.data_config["input_size"] == known["input_size"]


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


HERE = ("models/tiny/config.json", "models/other/notes.txt", "gpt2/config.json", "org/name/config.json")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("modles/tiny", "did you mean 'models/tiny'?"),
        ("models/tinny", "did you mean 'models/tiny'?"),
        ("./models/tin", "did you mean 'models/tiny'?"),
        ("~/models/tinyy", "did you mean 'models/tiny'?"),
        ("models/nothing-like-it", "download it first: hf download models/nothing-like-it"),
        ("models/tiny/deep/er", "pass the folder of a model"),
        ("./x", "pass the folder of a model"),
        ("/gone/x", "pass the folder of a model"),
    ],
)
def test_a_mistyped_path_is_not_sought_on_the_hub(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one error at once, with the closest folder: asking the hub takes half a minute where none is reachable."""
    _offer(tmp_path, monkeypatch)
    asked = _note_asked(monkeypatch)
    with pytest.raises(ModelError, match=f"no such folder.*{re.escape(words)}"):
        load_pretrained("text-classification", source)
    with pytest.raises(ModelError, match="no such folder"), refusing(Base(source, "")):
        pass
    assert asked == []


@pytest.mark.parametrize("source", ["gpt", "gpt2-medium", "org2/new", "distil/gpt2", "microsoft/phi"])
def test_a_name_on_the_hub_is_asked_for(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a folder here has nearly that name. If it is not there either, the error says what was tried."""
    _offer(tmp_path, monkeypatch)
    asked = _note_asked(monkeypatch)
    hint = "; did you mean 'gpt2'?" if source in ("gpt",) else ""
    with pytest.raises(ModelError, match="the hub's cache on this machine does not have it") as raised:
        load_pretrained("text-classification", source)
    assert f"no such folder here{hint}" in str(raised.value)
    assert asked == [source]


def test_a_name_in_the_cache_or_with_a_revision_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may keep a folder that is named like an organisation of the hub."""
    _offer(tmp_path, monkeypatch)
    assert is_path("org/other")
    assert not is_path("org/other", "main")
    snapshot = tmp_path / "cache" / "models--org--other" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert not is_path("org/other")


def _offer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a working folder with some models, and an empty cache of the hub."""
    for name in HERE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))


def _note_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names for which transformers is asked from now on; it finds none."""
    asked: list[str] = []

    def ask(source: str, **_: object) -> None:
        asked.append(source)
        raise OSError("not found")

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", ask)
    return asked
