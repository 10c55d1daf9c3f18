"""A model's own ``save_pretrained``: a warning where it would lose adapters, and clean files where it would not."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit import injection
from tunerkit.errors import TunerkitWarning

if TYPE_CHECKING:
    from tests.support.toys import Toys

WAYS = r"tunerkit\.save\(model, path\).*unwrap\(model, keep_merged=True\).*Trainer, tunerkit\.attach"
IDS = torch.arange(6).reshape(2, 3)
COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "a deep copy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


class Saving(nn.Module):
    """A model with a ``save_pretrained`` of its own, as libraries other than transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def save_pretrained(self, folder: Path, *, name: str = "keys") -> list[str]:
        """Return the keys of ``state_dict()``, and write them."""
        keys = list(self.state_dict())
        (folder / name).write_text(json.dumps(keys))
        return keys


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the method is transformers'")


def bert(transformers: Any) -> Any:
    """A small classifier, in eval mode."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes)).eval()


def trained(toys: "Toys", model: nn.Module, **config: object) -> Any:
    return toys.fill_(tunerkit.wrap(model, "toy-low-rank", {"train_modules": ["classifier"], **config}))


def reloaded(transformers: Any, folder: Path) -> Tensor:
    """The logits of what ``from_pretrained`` makes of ``folder``."""
    again = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    logits: Tensor = again(IDS).logits
    return logits


def keys_in(folder: Path) -> list[str]:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TunerkitWarning)
        yield


@pytest.mark.parametrize("copied", COPIES)
def test_saving_a_wrapped_model_warns_with_the_three_right_ways(
    toys: "Toys", transformers: Any, tmp_path: Path, copied: str
) -> None:
    """The method keeps its meaning: it writes the model, and what it loads again is the untrained base."""
    model = bert(transformers)
    base = model(IDS).logits
    model = COPIES[copied](trained(toys, model))
    with pytest.warns(TunerkitWarning, match=WAYS):
        model.save_pretrained(tmp_path)
    assert torch.equal(reloaded(transformers, tmp_path), base)
    assert not torch.allclose(model(IDS).logits, base)


def test_a_part_of_the_model_warns_too(toys: "Toys", transformers: Any, tmp_path: Path) -> None:
    """The body inside a classifier has the method as well, and loses the adapters in it."""
    model = trained(toys, bert(transformers))
    with pytest.warns(TunerkitWarning, match="BertModel.save_pretrained"):
        model.bert.save_pretrained(tmp_path)


def test_uploading_warns_too(toys: "Toys", transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``push_to_hub`` writes a folder through the same method; nothing is uploaded here."""
    hub = pytest.importorskip("transformers.utils.hub")

    class Uploads:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: hub_answer

    hub_answer = type("Answer", (), {"repo_id": "me/mine"})()
    monkeypatch.setattr(hub, "hf_api", Uploads)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: type("C", (), {"save": print})())
    with pytest.warns(TunerkitWarning, match=WAYS):
        trained(toys, bert(transformers)).push_to_hub("mine")


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("passed", [False, True])
def test_a_merged_model_is_saved_whole_and_without_keys_of_adapters(
    toys: "Toys", transformers: Any, tmp_path: Path, copied: str, passed: bool
) -> None:
    """What is loaded again computes what the merged model does, also from a ``state_dict`` that was passed."""
    model = trained(toys, bert(transformers))
    output = model(IDS).logits
    model = COPIES[copied](tunerkit.merge(model))
    model.save_pretrained(tmp_path, **({"state_dict": model.state_dict()} if passed else {}))
    assert not [key for key in keys_in(tmp_path) if "tunerkit" in key]
    assert toys.close(reloaded(transformers, tmp_path), output)
    assert [key for key in model.state_dict() if "tunerkit" in key]  # only the file is without them


@pytest.mark.usefixtures("no_warning")
def test_the_base_alone_is_saved_inside_disabled(toys: "Toys", transformers: Any, tmp_path: Path) -> None:
    """There the weights are the base's, merged or not, and the file holds nothing else."""
    model = bert(transformers)
    base = model(IDS).logits
    trained(toys, model)
    for folder in (tmp_path / "unmerged", tmp_path / "merged"):
        with tunerkit.disabled(model):
            model.save_pretrained(folder)
        assert torch.equal(reloaded(transformers, folder), base)
        assert not [key for key in keys_in(folder) if "tunerkit" in key]
        if folder.name == "unmerged":
            tunerkit.merge(model)


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("keep_merged", [False, True])
def test_unwrapping_leaves_no_trace_of_it(toys: "Toys", tmp_path: Path, keep_merged: bool) -> None:
    """Afterwards the method is the class's again, and saving is silent."""
    model = Saving()
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    toys.fill_(tunerkit.wrap(model, "toy-low-rank", {"targets": ["layer"]}))
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["layer"]}, adapter="second")
    tunerkit.save(model, tmp_path / "kept", adapter="default")  # otherwise `unwrap` says that the training is lost
    assert tunerkit.unwrap(model, keep_merged=keep_merged).save_pretrained(tmp_path) == ["layer.weight", "layer.bias"]
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before


def test_any_class_with_the_method_is_watched(toys: "Toys", tmp_path: Path) -> None:
    """Arguments and the result pass through, and an instance's own method is called and put back."""
    model: Any = Saving()
    own = vars(model)["save_pretrained"] = lambda folder, **options: ["own", *Saving.save_pretrained(model, folder)]
    outer = nn.Sequential(model, nn.Linear(3, 3))
    toys.fill_(tunerkit.wrap(outer, "toy-low-rank", {"targets": ["0.layer"]}))
    with pytest.warns(TunerkitWarning, match=r"Saving\.save_pretrained"):
        assert model.save_pretrained(tmp_path, name="list")[:2] == ["own", "layer.weight"]
    tunerkit.merge(outer)
    assert model.save_pretrained(tmp_path) == ["own", "layer.weight", "layer.bias"]
    tunerkit.unwrap(outer)
    assert vars(model)["save_pretrained"] is own


def test_the_copy_of_a_module_trained_in_full_is_not_watched(toys: "Toys") -> None:
    """It is a part of the adapter, and whoever saves it alone means it."""
    outer = nn.Sequential(nn.Linear(3, 3), Saving())
    for name in ("first", "second"):
        tunerkit.wrap(outer, "toy-low-rank", {"targets": ["0"], "train_modules": ["1"]}, adapter=name)
        tunerkit.activate(outer, [])
    for _, slot in injection.slots_in(tunerkit.tuner(outer, "second")):
        assert slot.copy is None or "save_pretrained" not in vars(slot.copy)
