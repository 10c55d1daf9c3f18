"""Methods that adapt outputs: norms, activations and whole blocks, of which tunerkit knows no weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.model_checks import check_common, nudge_
from tests.support.toy_outputs import Affine, AffineConfig, OutputPlugin
from tests.support.toy_readers import Scale, ScaleConfig, ScalePlugin
from tests.support.toys import Building, Running, registering
from tunerkit.plugin import BaseLayer, Method
from tunerkit_testing.cases import Case
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Returns a tuple: its output, and something that is no output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
        return x + torch.tanh(self.layer(self.norm(x))) * scale, "attention"


class Model(nn.Module):
    """Two blocks, a container that runs its children, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.pool = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, said = block(x, scale=0.5)
            assert said == "attention"
        result: Tensor = self.head(self.last(self.pool(x)))
        return result


_toys = registering(OutputPlugin(), LowRankPlugin(), ScalePlugin())


PLACES = {
    "norms": ["last", "blocks.*.norm"],
    "blocks": ["blocks.0", "blocks.1"],
    "an activation": ["pool.1"],
    "layers with a weight": ["blocks.0.layer", "pool.0"],
    "a block and what is in it": ["blocks.0", "blocks.0.norm", "blocks.0.layer"],
}
each_place = pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())


def wrapped(places: list[str], model: nn.Module | None = None) -> nn.Module:
    return tunerkit.wrap(model or Model(), "toy-outputs", {"targets": places})


def trained(places: list[str]) -> nn.Module:
    return nudge_(wrapped(places))


def output(model: nn.Module) -> Tensor:
    found: Tensor = model(X)
    return found


@each_place
def test_it_does_what_any_method_does(places: list[str]) -> None:
    """It starts as the base, trains, is saved, loaded, copied and unwrapped, also where a block returns a tuple."""
    case = Case("outputs", Model, output, lambda model: output(model).square().mean(), {"targets": places}, lr=0.05)
    check_common("toy-outputs", case, skipped=("merges", "keeps_merged"))


def test_a_blocks_output_is_the_first_of_the_tuple() -> None:
    """By hand: the adapter sees the block's output, and the rest of the tuple passes."""
    model: Any = trained(["blocks.0"])
    adapter, block = tunerkit.tuner(model).adapters()["blocks.0"], Model().blocks[0]
    found, said = model.blocks[0](X, scale=0.5)
    own, _ = block(X, scale=0.5)
    torch.testing.assert_close(found, own * (1 + adapter.get_parameter("scale")) + adapter.get_parameter("shift"))
    assert said == "attention"


@each_place
def test_its_reference_computes_the_same(places: list[str]) -> None:
    """As with any method."""
    pytest.importorskip("tunerkit_transformers", reason="it makes references")
    model = trained(places)
    assert torch.equal(tunerkit.reference(model)(X), model(X))


@pytest.mark.parametrize("places", [["last"], ["blocks.0"], ["pool.0"]])
def test_merging_is_refused_in_words(places: list[str]) -> None:
    """The method has no delta; nothing changes."""
    model = trained(places)
    before = model(X)
    with pytest.raises(tunerkit.errors.AdapterError, match=r"'toy-outputs' cannot be merged: .*tunerkit_delta"):
        tunerkit.merge(model)
    with pytest.raises(tunerkit.errors.AdapterError, match="cannot be merged"):
        tunerkit.unwrap(model, keep_merged=True)
    assert torch.equal(model(X), before)


class ScaledOutputs(ScalePlugin):
    """A `ScalePlugin` that adapts any output; it has a delta where there is a weight."""

    method = Method("toy-scaled-outputs", config=ScaleConfig, targets="outputs")

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Any:
        return Scale(base) if base.has_weight else Affine(8)


def test_with_a_delta_the_layers_that_have_a_weight_merge() -> None:
    """Norms too; a block beside them is refused, with its path and its type."""
    with registered(ScaledOutputs()):
        for places, refused in ((["pool.0", "last", "blocks.0.layer"], False), (["pool.0", "pool.1"], True)):
            model = tunerkit.wrap(Model(), "toy-scaled-outputs", {"targets": places})
            expected = nudge_(model)(X)
            if refused:
                words = r"cannot merge into 'pool.1'.*'toy-scaled-outputs' changes the output of a Tanh"
                with pytest.raises(tunerkit.errors.AdapterError, match=words):
                    tunerkit.merge(model)
                assert torch.equal(model(X), expected)
            else:
                tunerkit.merge(model)
                torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)


def test_it_stands_beside_a_method_of_weights() -> None:
    """At one layer both apply: the output method reads the layer's own output, whichever came first."""
    found = []
    for order in (("toy-outputs", "toy-low-rank"), ("toy-low-rank", "toy-outputs")):
        model: nn.Module = Model()
        for method in order:
            model = tunerkit.wrap(model, method, {"targets": ["pool.0"]}, adapter=method, seed=0)
        found.append(nudge_(model)(X))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (["blocks"], "blocks.*ModuleList, which is never called, so it has no output"),
        (["attention.out_proj"], "attention.out_proj.*bypassing its forward"),
        (["pool"], "pool: is an nn.Sequential, which would run the adapter.*name its last layer"),
        (["lats"], "lats.*last"),
    ],
)
def test_what_has_no_output_of_its_own_is_refused(places: list[str], words: str) -> None:
    """With the path, the reason, and the closest name where it was mistyped."""
    model = Model()
    model.attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(tunerkit.errors.TargetError, match=f"(?s){words}"):
        wrapped(places, model)


class Dictionary(nn.Module):
    """Its output is no tensor."""

    def forward(self, x: Tensor) -> Any:
        return {"hidden": x}


def test_an_output_that_is_no_tensor_is_refused_in_words() -> None:
    """The error names the method and the module, and what such a module returned."""
    model = wrapped(["part"], Running(lambda m, x: m.part(x)["hidden"], part=Dictionary()))
    with pytest.raises(tunerkit.errors.AdapterError, match=r"(?s)'toy-outputs'.*Dictionary.*returned a dict.*tensor"):
        model(X)


def test_a_weight_method_leaves_norms_alone() -> None:
    """Only methods that say so adapt outputs."""
    with pytest.raises(tunerkit.errors.TargetError, match="LayerNorm, which cannot be adapted"):
        tunerkit.wrap(Model(), "toy-low-rank", {"targets": ["last"]})


def test_a_method_that_reads_weights_is_refused_where_there_is_none() -> None:
    """When wrapping, with the path."""

    def build(base: BaseLayer) -> Any:
        adapter: Any = Affine(8)
        adapter.reads_weight = True
        return adapter

    with registered(Building("toy-reader", build, AffineConfig, targets="outputs")):
        with pytest.raises(tunerkit.errors.TargetError, match=r"'pool.1' is a Tanh.*'toy-reader' reads the weight"):
            tunerkit.wrap(Model(), "toy-reader", {"targets": ["pool.1"]})
        tunerkit.wrap(Model(), "toy-reader", {"targets": ["pool.0"]})


def test_what_is_asked_of_a_missing_weight_is_named() -> None:
    """An adapter that asks for it is told where to read sizes."""
    with registered(ScaledOutputs()):
        model: Any = tunerkit.wrap(Model(), "toy-scaled-outputs", {"targets": ["pool.1"]})
        base = model.pool[1].tunerkit.base
        for ask in (lambda: base.in_features, lambda: base.out_features, base.dense, lambda: base.pack(X)):
            with pytest.raises(tunerkit.errors.AdapterError, match=r"Tanh, whose weight .*not know.*target\.module"):
                ask()
        assert base.bias() is None


def test_blocks_of_a_bert_are_adapted(tmp_path: Path) -> None:
    """Norms and layers of a transformers model, saved and loaded."""
    pytest.importorskip("transformers")
    from tunerkit_testing.transformers_cases import bert

    ids = torch.randint(61, (2, 5), generator=torch.Generator().manual_seed(0))
    config = {"targets": ["encoder.layer.0", "encoder.layer.1.output.LayerNorm"], "features": 16}
    config["train_modules"] = ["classifier"]
    model = tunerkit.wrap(bert().eval(), "toy-outputs", config)
    assert torch.equal(model(ids).logits, bert().eval()(ids).logits)
    nudge_(model)
    loaded = tunerkit.load(bert().eval(), tunerkit.save(model, tmp_path))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, bert().eval()(ids).logits)


class Constant(nn.Module):
    """Takes no input."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(8))

    def forward(self) -> Tensor:
        return self.values


def test_a_module_without_input_has_an_output_all_the_same() -> None:
    """Its adapter is given None as the input."""
    model = wrapped(["part"], Running(lambda m, x: x + m.part(), part=Constant()))
    assert torch.equal(model(X), X + 1)


def test_an_output_method_works_where_another_adapter_trains_the_bias() -> None:
    """A norm has no base-layer kind; whichever adapter comes first, the method sees a layer."""
    model = Model()
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["layer"], "bias": "all"}, adapter="biases")
    tunerkit.wrap(model, "toy-outputs", {"targets": ["norm"]}, adapter="outputs")
    assert not torch.equal(nudge_(model, "outputs")(X), Model()(X))
    with pytest.raises(tunerkit.errors.AdapterError, match=r"'toy-outputs' cannot be|merge into 'blocks\.0\.norm'"):
        tunerkit.merge(model)
