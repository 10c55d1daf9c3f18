"""A second adapter on a new head that the first one trains: its file fits where that one is loaded too."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch

import tunerkit
from tunerkit.errors import BaseMismatchError, FileError, TunerkitWarning
from tunerkit.serialization.fingerprint import beside_of
from tunerkit.serialization.header import read

if TYPE_CHECKING:
    from tests.support.toys import Toys

transformers = pytest.importorskip("transformers")  # untyped: its configs take any keyword


IDS = torch.arange(6).reshape(2, 3)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


def head(folder: Path) -> Any:
    """A new classifier on a checkpoint without one."""
    if not (folder / "bert").exists():
        transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder / "bert")
    return transformers.BertForSequenceClassification.from_pretrained(folder / "bert").eval()


def tokens(folder: Path) -> Any:
    """A Llama with added tokens."""
    if not (folder / "llama").exists():
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    model.resize_token_embeddings(24)
    return model


def quietly(call: Callable[[], Any]) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(each.filename == __file__ for each in caught if each.category is TunerkitWarning)
    return [str(each.message) for each in caught if each.category is TunerkitWarning]


def pair(toys: "Toys", load: Callable[[Path], Any], folder: Path, *, anew: bool) -> torch.Tensor:
    """Train and save ``default`` and then, on top of it, ``b``; ``anew``: in another process. Return the logits."""
    model = load(folder)
    quietly(lambda: tunerkit.wrap(model, "toy-low-rank"))
    tunerkit.save(toys.fill_(model), folder / "default")
    if anew:
        model = tunerkit.load(load(folder), folder / "default")
    tunerkit.freeze(model, "default")
    assert quietly(lambda: tunerkit.wrap(model, "toy-low-rank", adapter="b")) == []
    with torch.no_grad():
        for parameter in tunerkit.tuner(model, "b").parameters():
            parameter.add_(0.1)
    assert quietly(lambda: tunerkit.save(model, folder / "b", adapter="b")) == []
    logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("load", [head, tokens])
def test_an_adapter_on_a_new_head_of_another_fits_every_process_with_both(
    toys: "Toys", load: Callable[[Path], Any], anew: bool, tmp_path: Path
) -> None:
    """It never used the base's own random values, so its fingerprint leaves them out."""
    logits = pair(toys, load, tmp_path, anew=anew)
    model = load(tmp_path)
    assert quietly(lambda: tunerkit.load(model, tmp_path / "default")) == []
    assert quietly(lambda: tunerkit.load(model, tmp_path / "b", adapter="b")) == []
    assert toys.close(model(IDS).logits, logits)
    tunerkit.save(model, tmp_path / "again", adapter="b")
    assert quietly(lambda: tunerkit.load(model, tmp_path / "again", adapter="again")) == []


def test_loaded_alone_it_says_which_module_another_adapter_trained(toys: "Toys", tmp_path: Path) -> None:
    """The head is random there. Loaded after it, the other adapter gives the same model."""
    logits = pair(toys, head, tmp_path, anew=False)
    model = head(tmp_path)
    (text,) = quietly(lambda: tunerkit.load(model, tmp_path / "b", adapter="b"))
    assert "trained together with another adapter, which trained classifier in full" in text
    assert "Load the other adapter too" in text
    assert "\n" not in text
    assert quietly(lambda: tunerkit.load(model, tmp_path / "default")) == []
    assert toys.close(model(IDS).logits, logits)


def test_a_loaded_module_that_another_adapter_trains_stays_in_the_fingerprint(toys: "Toys", tmp_path: Path) -> None:
    """It has the same values in every process, so another one is another base."""
    head(tmp_path).save_pretrained(tmp_path / "whole")

    def load() -> Any:
        return transformers.BertForSequenceClassification.from_pretrained(tmp_path / "whole")

    model = tunerkit.wrap(load(), "toy-low-rank", {"train_modules": ["classifier"]})
    tunerkit.wrap(model, "toy-low-rank", adapter="b")
    toys.fill_(model)
    tunerkit.save(model, tmp_path / "b", adapter="b")
    assert quietly(lambda: tunerkit.load(load(), tmp_path / "b")) == []
    other = load()
    with torch.no_grad():
        other.classifier.weight.add_(1)
    with pytest.raises(BaseMismatchError, match=r"other values: classifier\.weight"):
        tunerkit.load(other, tmp_path / "b")


@pytest.mark.parametrize("entry", ["classifier", [3], {}, None])
def test_an_entry_that_tunerkit_would_not_write_is_refused(toys: "Toys", saved: Path, entry: Any) -> None:
    """A file may be forged with a right digest."""
    _, _, header = read(saved, content="adapter")
    with pytest.raises(FileError, match="trained_beside"):
        beside_of(attrs.evolve(header, values={"trained_beside": entry}), "file")
    assert beside_of(header, "file") == ()
