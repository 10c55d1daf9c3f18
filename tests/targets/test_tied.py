"""Adapters at all sides of a tied weight change each on their own, and one side alone is refused with the way out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.model_checks import each_copy, silent
from tests.support.tied_models import HOW, MODELS, SIDES, Toy, logits, settings, sharing, tied, trained, untie_
from tests.support.toys import Toys
from tunerkit.errors import TargetError, TunerkitWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:these adapters never ran.* shared"),  # T5 holds it and never calls it
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
]
# What is adapted


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_each_side_changes_on_its_own(toys: "Toys", tmp_path: Path, name: str, how: str) -> None:
    """The output is that of an untied model with the same adapter, from the first forward to a loaded file."""
    base = logits(tied(name))
    model = tunerkit.wrap(tied(name), "toy-low-rank", settings(name, how), seed=3)
    assert torch.equal(logits(model), base)
    output = logits(toys.fill_(model))
    untied = toys.fill_(tunerkit.wrap(untie_(tied(name)), "toy-low-rank", settings(name, how), seed=3))
    assert torch.equal(logits(untied), output)
    assert not toys.close(output, base)
    with tunerkit.disabled(model):
        assert torch.equal(logits(model), base)
    path = tunerkit.save(model, tmp_path)
    assert torch.equal(logits(tunerkit.load(tied(name), path)), output)
    assert torch.equal(logits(tunerkit.load(untie_(tied(name)), path)), output)
    plain = tied(name)
    assert sharing(tunerkit.unwrap(model)).keys() == sharing(plain).keys()
    assert torch.equal(logits(model), base)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, _ in plain.named_parameters()]


@each_copy
def test_a_copy_of_the_model_is_tied_and_adapted_too(toys: "Toys", way: Any) -> None:
    """The copy computes the same and shares nothing with the model."""
    model = trained(toys, "toy")
    twin = way(model)
    assert torch.equal(logits(twin), logits(model))
    assert twin.head.weight is twin.embed.weight
    assert twin.head.weight is not model.head.weight
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_training_resumes_exactly(toys: "Toys", tmp_path: Path) -> None:
    """With gradient checkpointing, stopping and going on in another process ends where one run ends."""

    def train(model: Any, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            logits(model, grad=True).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def attached(model: Any) -> Any:
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(tunerkit.tuner(model).parameters(), lr=0.01)
        tunerkit.attach(model.train(), optimizer, total_steps=4)
        return optimizer

    whole = tunerkit.wrap(tied("llama"), "toy-stepper", {"targets": ["lm_head", "embed_tokens"]}, seed=3)
    optimizer = attached(whole)
    train(whole, optimizer, 2)
    file, state = tunerkit.save(whole, tmp_path / "file"), tunerkit.save_state(whole, tmp_path / "state")
    saved = copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, 2)
    again = tunerkit.load(tied("llama"), file, trainable=True)
    other = attached(again)
    tunerkit.load_state(again, state)
    other.load_state_dict(saved)
    train(again, other, 2)
    assert tunerkit.tuner(again).steps == 4
    assert torch.equal(logits(again), logits(whole))
    assert not torch.equal(logits(again), logits(tied("llama")))


def test_a_bias_that_another_name_stands_for_is_trained_at_the_layer(toys: "Toys") -> None:
    """BERT's masked head names its decoder's bias itself. The decoder adds the trained one, also when merged."""
    model = trained(toys, "bert", bias="adapters")
    output = logits(model)
    assert any(place.path.endswith("decoder") for place in tunerkit.tuner(model).biases)
    assert toys.close(logits(tunerkit.merge(model)), output)
    assert torch.equal(model.cls.predictions.bias, tied("bert").cls.predictions.bias)
    before = sharing(tunerkit.unmerge(model))
    assert before["cls.predictions.bias"] == before["cls.predictions.decoder.bias"]


# What is refused, and the way out


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_one_side_alone_is_refused_and_both_ways_out_work(toys: "Toys", name: str, how: str) -> None:
    """The error gives the setting that names all sides, and the code that unties the model: either is enough."""
    alone = {**settings(name, how), how: [SIDES[name][-1]]}
    with pytest.raises(TargetError) as caught:
        tunerkit.wrap(tied(name), "toy-low-rank", alone)
    text = str(caught.value)
    assert text.count("\n") == 0
    named, _, code = text.partition(f"{how}=(")[2].partition(
        "). Or untie the model before you wrap it or load onto it: "
    )
    sides = named.replace('"', "").split(", ")
    tunerkit.wrap(tied(name), "toy-low-rank", {**alone, how: sides})
    model = tied(name)
    exec(code, {"torch": torch, "model": model})  # what a reader would paste
    assert model.config.tie_word_embeddings is False
    tunerkit.wrap(model, "toy-low-rank", alone)


def test_sides_in_two_settings_are_refused_with_the_one_to_use(toys: "Toys") -> None:
    """One side as a target and the other as a copy is an error that names both for one setting."""
    with pytest.raises(TargetError, match=r'tied to embed\.weight\. .*train_modules=\("embed", "head"\)'):
        tunerkit.wrap(tied("toy"), "toy-low-rank", {"targets": ["embed"], "train_modules": ["head"]})


def test_a_path_with_a_number_is_untied_too(toys: "Toys") -> None:
    """Such a path is no attribute, and without a config there is no flag to set."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(TargetError) as caught:
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["1"]})
    code = str(caught.value).partition("load onto it: ")[2]
    assert code.startswith('model.get_submodule("1").weight = ')
    exec(code, {"torch": torch, "model": model})  # what a reader would paste
    assert tunerkit.tuner(tunerkit.wrap(model, "toy-low-rank", {"targets": ["1"]})).ranks().keys() == {"1"}


def test_a_holder_that_is_no_layer_cannot_be_named(toys: "Toys") -> None:
    """If a module that cannot be a target holds the weight too, the error only says how to untie."""
    model = Toy()
    model.table = model.embed.weight
    with pytest.raises(TargetError, match=r"change the others\. Untie the model before") as caught:
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["embed", "head"]})
    assert "targets=(" not in str(caught.value)


def test_a_file_for_one_side_loads_only_onto_an_untied_base(toys: "Toys", tmp_path: Path) -> None:
    """On the tied base the other module would lack the change; the error's code makes the base fit."""
    for how in HOW:
        config = {**settings("toy", how), how: ["head"]}
        model = toys.fill_(tunerkit.wrap(untie_(tied("toy")), "toy-low-rank", config))
        path = tunerkit.save(model, tmp_path / how)
        with pytest.raises(TargetError, match="tied") as caught:
            tunerkit.load(tied("toy"), path)
        base = tied("toy")
        exec(str(caught.value).partition("load onto it: ")[2], {"torch": torch, "model": base})  # as pasted
        assert torch.equal(logits(tunerkit.load(base, path)), logits(model))


@pytest.mark.parametrize("broad", ["*", "re:.*(embed|head)|body"])
def test_a_broad_pattern_unties_nothing(toys: "Toys", broad: str) -> None:
    """It does not say that each side should change on its own; plain names do, also beside it."""
    with pytest.warns(TunerkitWarning, match=r"(?s)left out.*embed: has a tied weight.*head: has a tied weight"):
        model = tunerkit.wrap(tied("toy"), "toy-low-rank", {"targets": broad})
    assert list(tunerkit.tuner(model).adapters()) == ["body"]
    with silent():
        both = tunerkit.wrap(tied("toy"), "toy-low-rank", {"targets": [broad, "embed", "head"]})
    assert list(tunerkit.tuner(both).adapters()) == ["embed", "body", "head"]
