"""Merging adapters at all sides of a tied weight unties the model, exactly until it is undone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.interrupting import interrupt
from tests.support.model_checks import each_copy
from tests.support.tied_models import HOW, MODELS, logits, sharing, tied, trained, untie_
from tests.support.toys import Running, Toys
from tunerkit.errors import AdapterError
from tunerkit.hooks.loading import Catalog
from tunerkit.injection import is_merged, walk

pytestmark = [
    pytest.mark.filterwarnings("ignore:these adapters never ran.* shared"),  # T5 holds it and never calls it
    pytest.mark.filterwarnings("ignore:unwrap undoes the merge"),
]


def apart(model: Any) -> bool:
    """Whether the toy's two modules have separate weights, and its config says so."""
    separate = model.head.weight is not model.embed.weight
    assert model.config.tie_word_embeddings is not separate
    return separate


def parting(model: nn.Module) -> list[object]:
    """What modules hold of their ties while they are merged."""
    return [slots.parting for _, _, slots in walk(model) if slots.parting is not None]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_merging_unties_and_unmerging_restores_the_shared_object(toys: "Toys", name: str, how: str) -> None:
    """Merged output is equal within the tolerance. disabled and unmerge show the very same tied parameters."""
    model = trained(toys, name, how)
    base, output, before = logits(tied(name)), logits(model), sharing(model)
    values = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    merged = logits(tunerkit.merge(model))
    assert toys.close(merged, output)
    assert model.config.tie_word_embeddings is False
    assert len(set(sharing(model).values())) > len(set(before.values()))
    with tunerkit.disabled(model):
        assert torch.equal(logits(model), base)
        assert sharing(model) == before
        assert model.config.tie_word_embeddings is True
    assert torch.equal(logits(model), merged)
    tunerkit.unmerge(model)
    assert sharing(model) == before
    assert model.config.tie_word_embeddings is True
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters(remove_duplicate=False))
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS[1:])
def test_a_merged_model_is_saved_whole(toys: "Toys", tmp_path: Path, name: str, how: str) -> None:
    """save_pretrained writes every side, while merged and after unwrapping; inside disabled it writes the tied base."""
    model = tunerkit.merge(trained(toys, name, how))
    merged = logits(model)
    model.save_pretrained(tmp_path / "merged")
    with tunerkit.disabled(model):
        model.save_pretrained(tmp_path / "base")
    tunerkit.unwrap(model, keep_merged=True)
    model.save_pretrained(tmp_path / "unwrapped")
    kind = type(model)
    for folder in ("merged", "unwrapped"):
        assert torch.equal(logits(kind.from_pretrained(tmp_path / folder).eval()), merged)
    base = kind.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(logits(base), logits(tied(name)))
    assert len(set(sharing(base).values())) < len(sharing(base))


@pytest.mark.parametrize("permanent", [False, True])
def test_the_unwrapped_model_is_untied_and_trains_each_side(toys: "Toys", permanent: bool) -> None:
    """No parameter stays frozen, and none that stood for the shared one is left behind."""
    model = trained(toys, "toy")
    output = logits(model)
    with torch.inference_mode(permanent):
        tunerkit.merge(model, permanent=permanent)
    if permanent:
        assert parting(model) == []
    tunerkit.unwrap(model, keep_merged=True)
    assert apart(model)
    assert toys.close(logits(model), output)
    logits(model, grad=True).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {"embed.weight", "head.weight"} <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("inside", [False, True])
@each_copy
def test_a_copy_of_a_merged_model_has_a_tie_of_its_own(toys: "Toys", way: Any, inside: bool) -> None:
    """It unmerges to one shared object, without changing the model. A copy made inside disabled is not merged."""
    model = trained(toys, "toy")
    output = logits(model)
    merged = logits(tunerkit.merge(model))
    if inside:
        with tunerkit.disabled(model):
            twin = way(model)
        assert not is_merged(twin)
        tunerkit.merge(twin)
    else:
        twin = way(model)
    assert apart(twin)
    assert torch.equal(logits(twin), merged)
    assert not apart(tunerkit.unmerge(twin))
    assert torch.equal(logits(twin), output)
    assert apart(model)
    assert torch.equal(logits(model), merged)


def test_a_merged_model_follows_to(toys: "Toys") -> None:
    """After model.to(dtype) the shared object is back in that dtype, with values of the base."""
    model = trained(toys, "toy")
    shared, base = model.head.weight, tied("toy").to(torch.bfloat16)
    tunerkit.merge(model).to(torch.bfloat16)
    with tunerkit.disabled(model):
        assert torch.equal(logits(model), logits(base))
    tunerkit.unwrap(model)
    assert model.head.weight is shared
    assert model.embed.weight is shared
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("both", [False, True])
def test_only_settings_under_which_nothing_stays_tied_change(toys: "Toys", both: bool) -> None:
    """One flag stands for all ties around it: a model with another tied part keeps it, and the merged part does not."""
    pair: Any = Running(lambda m, ids: m.one(ids) + m.two(ids), one=tied("toy"), two=tied("toy"))
    pair.config = SimpleNamespace(tie_word_embeddings=True, text_config=SimpleNamespace(tie_word_embeddings=True))
    sides = ["embed", "head"] if both else ["one.embed", "one.head"]
    model: Any = tunerkit.wrap(pair, "toy-low-rank", {"targets": sides})
    configs = (model.config, model.config.text_config, model.one.config, model.two.config)
    tunerkit.merge(model)
    assert [config.tie_word_embeddings for config in configs] == [not both, not both, False, not both]
    tunerkit.unmerge(model)
    assert all(config.tie_word_embeddings for config in configs)


def test_two_adapters_at_one_tie_merge_together_or_one_by_one(toys: "Toys") -> None:
    """Each has all sides, so whichever is active can be merged."""
    model = trained(toys, "toy")
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["head", "embed"]}, adapter="two", seed=4)
    toys.fill_(model)
    for names in (["default", "two"], ["two"], ["default"]):
        tunerkit.activate(model, names)
        output = logits(model)
        assert toys.close(logits(tunerkit.merge(model)), output)
        assert apart(model)
        assert not apart(tunerkit.unmerge(model))
        assert torch.equal(logits(model), output)


def test_a_trained_bias_of_a_tied_head_merges_and_unties_nothing(toys: "Toys") -> None:
    """The weight is not merged there, so the modules may keep sharing it."""
    model = toys.fill_(tunerkit.wrap(tied("toy"), "toy-low-rank", {"targets": ["body"], "bias": "all"}))
    output = logits(model)
    assert toys.close(logits(tunerkit.merge(model)), output)
    assert not apart(model)


def test_a_packed_weight_is_not_split(toys: "Toys") -> None:
    """Its parameter is more than its values, so the merge is refused before anything changes."""

    class Packed(nn.Parameter):
        pass

    model = tied("toy")
    model.head.weight = model.embed.weight = Packed(model.embed.weight.detach())
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["embed", "head"]})
    before = sharing(model)
    with pytest.raises(AdapterError, match=r"embed\.weight, head\.weight share one Packed, which cannot be untied"):
        tunerkit.merge(model)
    assert sharing(model) == before


def test_layers_that_were_tied_after_wrapping_are_merged_apart(toys: "Toys") -> None:
    """Both are adapted, so each merges its own change, as in forward."""
    model = trained(toys, "toy")
    untie_(model)
    model.head.weight = model.embed.weight
    output = logits(model)
    assert toys.close(logits(tunerkit.merge(model)), output)
    assert not apart(tunerkit.unmerge(model))


def test_what_is_tied_inside_a_copy_stays_tied(toys: "Toys", tmp_path: Path) -> None:
    """A module trained in full keeps its inner tie when it leaves the outer one, and the config goes on saying so."""

    def build() -> Any:
        model: Any = tied("toy")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model.head = Running(lambda m, x: m.one(x) + m.two(x), one=nn.Linear(6, 10), two=nn.Linear(6, 10))
        model.head.one.weight = model.head.two.weight = model.embed.weight
        return model

    model = tunerkit.wrap(build(), "toy-low-rank", {"targets": ["body"], "train_modules": ["embed", "head"]})
    output, before = logits(toys.fill_(model)), sharing(model)
    assert torch.equal(logits(tunerkit.load(build(), tunerkit.save(model, tmp_path))), output)
    assert toys.close(logits(tunerkit.merge(model)), output)
    assert model.head.one.weight is model.head.two.weight
    assert model.head.one.weight is not model.embed.weight
    assert model.config.tie_word_embeddings is True
    assert sharing(tunerkit.unmerge(model)) == before


def test_settings_that_nothing_changes_are_named(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the plugin that knows a library, merging says that its config is left as it is."""
    model = trained(toys, "toy")
    model.__class__ = type("Tied", (type(model),), {"__module__": "transformers.models.tied"})
    monkeypatch.setattr(Catalog, "absence", lambda self, name: f"{name} is not installed")
    words = "still marks them as tied: tunerkit-transformers knows"
    with pytest.warns(tunerkit.TunerkitWarning, match=words) as told:
        tunerkit.merge(model)
    assert told[0].filename == __file__


@pytest.mark.parametrize("what", ["merge", "permanent", "unmerge", "unwrap"])
def test_an_interrupt_leaves_the_tie_as_before_or_as_after(toys: "Toys", what: str) -> None:
    """Ctrl-C at any line: the sides are apart exactly if the model is merged, and the base can be shown again."""
    calls: dict[str, tuple[Any, str]] = {
        "merge": (tunerkit.merge, "requiring_effect"),
        "permanent": (lambda model: tunerkit.merge(model, permanent=True), "requiring_effect"),
        "unmerge": (tunerkit.unmerge, "restore_originals_"),
        "unwrap": (tunerkit.unwrap, "restore_originals_"),
    }
    call, after = calls[what]

    def make() -> Any:
        model = trained(toys, "toy")
        return tunerkit.merge(model) if what.startswith("un") else model

    total = interrupt(lambda: call(make()), after=after)
    for at in {*range(1, total + 1, 5), total - 2, total - 1, total}:
        model = make()
        interrupt(lambda: call(model), after=after, at=at)  # noqa: B023  # called at once
        merged = is_merged(model)
        assert apart(model) is merged
        if not merged:
            assert all(torch.equal(p, q) for p, q in zip(base_of(model), tied("toy").parameters(), strict=True))
            assert parting(model) == []


def base_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".tunerkit." not in name]
