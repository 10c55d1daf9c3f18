"""A quantiser of the test's own, with a kind in a few lines: adapted, saved, merged, made dense; what is refused."""

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunerkit
from tests.support.interrupting import half_done, interrupt
from tests.support.toy_readers import DirectionPlugin
from tunerkit.errors import AdapterError
from tunerkit.plugin import BaseLayer, Packing
from tunerkit.serialization.fingerprint import fingerprint
from tunerkit_quant import PackedLinear
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, train, trainable
from tunerkit_testing.toy_methods import LowRankPlugin, ShiftPlugin

TARGETS: dict[str, Any] = {"targets": ["0", "2"]}


class Code:
    """What a library may put beside a weight: no tensor, no parameter."""

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale


class ToyLinear(nn.Module):
    """x Wᵀ + b, with W as integers from -7 to 7 and a scale for each row, in an object that torch does not know."""

    usable = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)  # a library's own packing
        self.code = quantise(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.code.integers * self.code.scale, self.bias)


def quantise(weight: Tensor) -> Code:
    scale = weight.abs().amax(1, keepdim=True) / 7
    return Code((weight / scale).round(), scale)


# --- The whole kind --------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class ToyLayer(PackedLinear):
    """`ToyLinear`."""

    module: ToyLinear

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module) is ToyLinear

    @property
    def packing(self) -> Packing:
        return Packing("toy int4", 4)

    def obstacle(self) -> str | None:
        return None if self.module.usable else "is not usable: make it so"

    def dense(self) -> Tensor:
        return self.module.code.integers * self.module.code.scale

    def requantised(self, weight: Tensor) -> Mapping[str, object]:
        return {"code": quantise(weight)}


class ToyPlugin:
    """The kind, and no method."""

    @tunerkit.hookimpl
    def tunerkit_base_layers(self) -> list[type[BaseLayer]]:
        return [ToyLayer]


# --- Tests -----------------------------------------------------------------------------------------------------------


class ReadOnlyLayer(ToyLayer):
    """The same, of a library that cannot write a weight."""

    requantised = PackedLinear.requantised


class ReadOnlyPlugin:
    """The kind, and no method."""

    @tunerkit.hookimpl
    def tunerkit_base_layers(self) -> list[type[BaseLayer]]:
        return [ReadOnlyLayer]


@pytest.fixture(autouse=True, scope="module")
def _methods() -> Iterator[None]:
    with registered(LowRankPlugin(), ShiftPlugin(), DirectionPlugin()):
        yield


@pytest.fixture
def toy() -> Iterator[None]:
    with registered(ToyPlugin()):
        yield


def quantised(*, every: bool = False) -> Any:
    """A model with two packed layers, or with all its three."""
    model: Any = net()
    for name in ("0", "2", "4")[: 3 if every else 2]:
        model[int(name)] = ToyLinear(model[int(name)])
    return model


def trained(method: str = "toy-low-rank", base: nn.Module | None = None, **config: Any) -> Any:
    model = tunerkit.wrap(quantised() if base is None else base, method, {**TARGETS, **config}, seed=0)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=20)
    assert train(model, optimizer, 20)[-1] < 1e9
    return model


def codes(model: Any) -> list[Tensor]:
    return [t.clone() for name in (0, 2) for t in (model[name].code.integers, model[name].code.scale)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_kind_takes_at_most_40_lines() -> None:
    """What a library needs to be supported fits on half a screen, and core knows nothing of it."""
    lines = inspect.getsource(ToyLayer) + inspect.getsource(ToyPlugin)
    assert len(lines.splitlines()) <= 40


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift", "toy-direction"])
def test_methods_train_save_merge_and_unmerge(method: str, tmp_path: Path) -> None:
    """Also one that reads W. Unmerging restores the very objects, and every number in them."""
    model = trained(method)
    before, objects, output = codes(model), [model[0].code, model[2].code], model(X)
    assert equal(before, codes(quantised()))
    loaded = tunerkit.load(quantised(), tunerkit.save(model, tmp_path))
    assert torch.equal(loaded(X), output)
    if method == "toy-shift":
        return
    with pytest.warns(tunerkit.TunerkitWarning, match="merged into 2 weight matrices of 4 bits"):
        tunerkit.merge(model)
    assert not equal(codes(model), before)
    with tunerkit.disabled(model):
        assert torch.equal(model(X), quantised()(X))
        assert model[0].code is objects[0]
    tunerkit.unmerge(model)
    assert [model[0].code, model[2].code] == objects
    assert equal(codes(model), before)
    assert torch.equal(model(X), output)


@pytest.mark.usefixtures("toy")
def test_files_describe_a_packed_weight_by_its_shape_alone(tmp_path: Path) -> None:
    """Under the name of the unquantised weight, so that a file fits either; nothing packed is in it, merged or not."""
    model = trained()
    found = fingerprint(tunerkit.tuner(model))
    assert found["0.weight"] == {
        "shape": [model[0].out_features, model[0].in_features],
        "dtype": "toy int4",
        "sample": [],
    }
    assert found.keys() == fingerprint(tunerkit.tuner(trained(base=net()))).keys()
    with pytest.warns(tunerkit.TunerkitWarning, match="4 bits"):
        tunerkit.merge(model)
    assert fingerprint(tunerkit.tuner(model)) == found


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("every", [False, True])
def test_an_adapter_fits_the_base_in_another_precision(every: bool, tmp_path: Path) -> None:
    """Both ways, also where layers without an adapter are quantised; one warning says what differs."""
    packed, dense = trained(base=quantised(every=every)), trained(base=net())
    count = 3 if every else 2
    with pytest.warns(tunerkit.TunerkitWarning, match=rf"{count} layers: toy int4 -> float32") as told:
        loaded = tunerkit.load(net(), tunerkit.save(packed, tmp_path / "packed"))
    assert len(told) == 1
    assert (loaded(X) - packed(X)).abs().max() < (quantised()(X) - net()(X)).abs().max() * 10
    with pytest.warns(tunerkit.TunerkitWarning, match=rf"{count} layers: float32 -> toy int4"):
        tunerkit.load(quantised(every=every), tunerkit.save(dense, tmp_path / "dense"))


@pytest.mark.usefixtures("toy")
def test_another_base_is_refused_whatever_its_precision(tmp_path: Path) -> None:
    """By shape and name, and by the values of what is not quantised."""
    path = tunerkit.save(trained(), tmp_path)
    other: Any = net()
    other[4].weight.data.add_(1)
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"other values: 4\.weight"):
        tunerkit.load(other, path)
    wider: Any = net()
    wider[0] = nn.Linear(wider[0].in_features + 1, wider[0].out_features)
    with pytest.raises(tunerkit.errors.BaseMismatchError, match=r"other shapes"):
        tunerkit.load(wider, path)


@pytest.mark.usefixtures("toy")
def test_the_error_of_a_merge_is_measured() -> None:
    """Beside the quantiser's own on a random matrix, which is of the same size, and what the adapters had changed."""
    model = trained()
    dense = [layer.code.integers * layer.code.scale for layer in (model[0], model[2])]
    assert tunerkit.rounding(model) == {}
    words = r"an error of \d+\.\d%; the base model's own error was \d+\.\d% before"
    with pytest.warns(tunerkit.TunerkitWarning, match=words) as told:
        tunerkit.merge(model)
    assert told[0].filename == __file__
    found = tunerkit.rounding(model)
    assert found.keys() == {"0", "2"}
    for path, weight in zip(found, dense, strict=True):
        assert found[path].stored_as == "toy int4"
        assert 0.3 * found[path].own < found[path].added < 3 * found[path].own
        assert found[path].change > 0
        assert weight.isfinite().all()
    tunerkit.unmerge(model)
    assert tunerkit.rounding(model) == {}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("merged", [False, True])
def test_unwrapping_with_a_dtype_makes_dense_layers(merged: bool) -> None:
    """W + ΔW is rounded to that dtype alone, also after a merge; layers without an adapter become dense too."""
    model = trained(base=quantised(every=True), bias="adapters")
    expected = model(X)
    if merged:
        with pytest.warns(tunerkit.TunerkitWarning, match="4 bits"):
            tunerkit.merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        dense = tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)
    assert dense is model
    assert [type(dense[i]) for i in (0, 2, 4)] == [nn.Linear] * 3
    assert torch.allclose(dense(X), expected, atol=1e-5)
    assert list(dense.state_dict()) == list(net().state_dict())
    assert not any(p.requires_grad for p in dense[0].parameters())


@pytest.mark.usefixtures("toy")
def test_unwrapping_with_a_dtype_alone_shows_the_dequantised_base() -> None:
    """Without keep_merged nothing of the adapters stays; the plain layer keeps its dtype."""
    model = tunerkit.unwrap(trained(), dtype=torch.float64)
    assert model[0].weight.dtype == torch.float64
    assert torch.equal(model[0].weight.float(), ToyLayer(quantised()[0]).dense())
    assert model[4].weight.dtype == torch.float32
    with pytest.raises(tunerkit.errors.ConfigError, match=r"expected torch\.float32 or"):
        tunerkit.unwrap(trained(), dtype=torch.int8)


@pytest.mark.usefixtures("toy")
def test_an_interrupted_unwrap_is_completed_or_not_begun() -> None:
    """Ctrl-C at any line leaves the adapters in, or the dense model."""
    call: Any = lambda model: tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)  # noqa: E731
    assert half_done(trained, call, after="_take_out_", points=10) == []


@pytest.mark.usefixtures("toy")
def test_an_interrupt_leaves_no_packed_model_disabled() -> None:
    """Ctrl-C at any line on the way into `disabled` or out of it: what the merge stored is in the layers again."""
    adapted = trained()
    unmerged = adapted(X)
    with pytest.warns(tunerkit.TunerkitWarning, match="4 bits"):
        merged = tunerkit.merge(adapted)
    stored, output = codes(merged), merged(X)

    def show(model: Any) -> None:
        with tunerkit.disabled(model):
            assert not equal(codes(model), stored)

    for line in range(1, interrupt(lambda: show(merged), after="_enable_"), 5):
        model = copy.deepcopy(merged)
        interrupt(lambda: show(model), after="_enable_", at=line)  # noqa: B023  # called at once
        assert equal(codes(model), stored)
        assert torch.equal(model(X), output)
        assert torch.equal(tunerkit.unmerge(model)(X), unmerged)


def test_a_library_that_cannot_write_is_refused_before_anything_changes() -> None:
    """The error says what works instead, and that works."""
    with registered(ReadOnlyPlugin()):
        model = trained()
        before, output = codes(model), model(X)
        with pytest.raises(
            tunerkit.errors.AdapterError, match=r"cannot merge into '0': .* as toy int4, and ReadOnlyLayer .*dtype"
        ):
            tunerkit.merge(model)
        assert equal(codes(model), before)
        assert torch.allclose(tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)(X), output, atol=1e-5)


@pytest.mark.usefixtures("toy")
def test_nothing_infinite_is_packed() -> None:
    """As integers it would be numbers again, and nobody would see it."""
    model = trained()
    before = codes(model)
    with torch.no_grad():
        next(tunerkit.tuner(model).parameters()).fill_(torch.inf)
    with pytest.raises(tunerkit.errors.AdapterError, match="add up to NaN or inf"):
        tunerkit.merge(model)
    assert equal(codes(model), before)


@pytest.mark.usefixtures("toy")
def test_a_packed_layer_that_passes_no_gradient_prevents_training(tmp_path: Path) -> None:
    """It need not be a target: the adapters before it would be trained on nothing. For inference it may be there."""
    model = quantised(every=True)
    path = tunerkit.save(trained(base=quantised(every=True), targets=["0"]), tmp_path)
    model[4].usable = False
    for call in (
        lambda: tunerkit.wrap(model, "toy-low-rank", {"targets": ["0"]}),
        lambda: tunerkit.load(model, path, trainable=True),
    ):
        with pytest.raises(tunerkit.errors.TargetError, match="4: is not usable: make it so"):
            call()
    tunerkit.load(model, path)


@pytest.mark.usefixtures("toy")
def test_integers_are_not_trained_in_full() -> None:
    """A copy of a packed layer would have nothing that can be trained."""
    with pytest.raises(tunerkit.errors.TargetError, match="train_modules: '2' is or contains a quantized ToyLinear"):
        tunerkit.wrap(quantised(), "toy-low-rank", {"targets": ["0"], "train_modules": ["2"]})


class NamedLayer(ToyLayer):
    """The same, described as torch's own integers are."""

    @property
    def packing(self) -> Packing:
        return Packing("int8", 8)


class NamedPlugin:
    """The kind, and no method."""

    @tunerkit.hookimpl
    def tunerkit_base_layers(self) -> list[type[BaseLayer]]:
        return [NamedLayer]


def test_a_packing_is_not_named_as_a_dtype_of_torch() -> None:
    """Files describe plain weights by such names, and would compare the packed one's integers with them."""
    with (
        registered(NamedPlugin()),
        pytest.raises(tunerkit.errors.PluginError, match=r"packing of NamedLayer has the name 'int8', .*'mylib int8'"),
    ):
        tunerkit.wrap(quantised(), "toy-low-rank", TARGETS)


class FixedBiasLayer(ToyLayer):
    """The same, of a library that hides its bias."""

    bias_name = "hidden"

    def bias(self) -> Tensor:
        return self.module.bias.detach()


class FixedBiasPlugin:
    """The kind, and no method."""

    @tunerkit.hookimpl
    def tunerkit_base_layers(self) -> list[type[BaseLayer]]:
        return [FixedBiasLayer]


def test_biases_that_a_library_hides_are_named() -> None:
    """Asked for and not trained is said once, with the layers."""
    with registered(FixedBiasPlugin()):
        with pytest.warns(tunerkit.TunerkitWarning, match="biases of 2 quantized layers are not trained.*: 0, 2$"):
            model = tunerkit.wrap(quantised(), "toy-low-rank", {**TARGETS, "bias": "adapters"})
        assert not tunerkit.tuner(model).biases


def test_a_kept_weight_follows_the_one_in_its_place_to_another_dtype() -> None:
    """As torchao's of few bits do, whose tensors have the dtype of the numbers that they stand for."""
    layer: Any = nn.Linear(2, 2).to(torch.bfloat16)
    kept = nn.Parameter(torch.ones(2, 2))
    ToyLayer(layer).put_({"weight": kept})
    assert layer.weight.dtype == torch.bfloat16
    ToyLayer(layer.float()).put_({"weight": kept})
    assert layer.weight is kept


def test_unwrapping_with_a_dtype_is_refused_where_merging_is() -> None:
    """With no active adapter, or where a layer was replaced and its adapter lost; nothing is changed."""
    with registered(ToyPlugin()):
        model = trained()
        tunerkit.activate(model, [])
        with pytest.raises(AdapterError, match="no adapter is active"):
            tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)
        tunerkit.activate(model, "default")
        fresh: Any = net()
        model[0] = ToyLinear(fresh[0])
        with pytest.raises(AdapterError):
            tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)
    assert type(model[2]) is ToyLinear


@pytest.mark.parametrize("keep_merged", [True, False])
@pytest.mark.filterwarnings("ignore::tunerkit.TunerkitWarning")
def test_a_failed_unwrap_of_a_merged_model_leaves_it_merged(keep_merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the very same values."""

    def fails(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with registered(ToyPlugin()):
        model = tunerkit.merge(trained())
        before = codes(model)
        monkeypatch.setattr("tunerkit.serialization.dense_layers", fails)
        with pytest.raises(KeyboardInterrupt):
            tunerkit.unwrap(model, keep_merged=keep_merged, dtype=torch.float32)
        assert all(map(torch.equal, codes(model), before))
        tunerkit.unmerge(model)


def test_dense_layers_made_in_inference_mode_can_be_trained() -> None:
    """As merged weights can."""
    with registered(ToyPlugin()):
        model = trained()
        with torch.inference_mode():
            tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)
    model.requires_grad_(True)
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, "float32"])
def test_a_dtype_that_no_dense_layer_has_is_refused(dtype: Any) -> None:
    """The error lists those that there are."""
    with (
        registered(ToyPlugin()),
        pytest.raises(tunerkit.errors.ConfigError, match=r"expected torch\.float32 or .* @ dtype"),
    ):
        tunerkit.unwrap(trained(), dtype=dtype)


@pytest.mark.filterwarnings("ignore::tunerkit.TunerkitWarning")
def test_what_adds_nothing_is_not_stored_again_and_what_adds_little_is_no_error() -> None:
    """Storing a weight again rounds it; a delta below one step of the quantiser is told by `rounding`."""
    with registered(ToyPlugin()):
        model = tunerkit.wrap(quantised(), "toy-low-rank", TARGETS, seed=0)
        before = codes(model)
        tunerkit.merge(model)
        assert all(map(torch.equal, codes(model), before))
        tunerkit.unmerge(model)
        for parameter in tunerkit.tuner(model).parameters():
            parameter.data.fill_(1e-5)
        tunerkit.merge(model)
        assert all(0 < each.change < each.own for each in tunerkit.rounding(model).values())


class Quantiser:
    """What transformers keeps beside a model that it has quantised."""

    def __init__(self, method: str) -> None:
        self.quantization_config = SimpleNamespace(quant_method=method)

    def remove_quantization_config(self, model: Any) -> None:
        del model.hf_quantizer


@pytest.mark.parametrize(
    ("method", "package", "forgotten"),
    [
        ("hqq", "hqq.core.quantize", [False, True]),
        ("compressed-tensors", "compressed_tensors", [False, False]),
    ],
)
def test_transformers_is_told_when_no_quantised_layer_is_left(method: str, package: str, forgotten: list[bool]) -> None:
    """Not while one is, and never of a library whose layers nobody here recognises."""
    layer: Any = type("Layer", (nn.Linear,), {"__module__": package})
    found = []
    for left in (layer, nn.Linear):
        model: Any = nn.Sequential(nn.Linear(4, 4), left(4, 4))
        model.hf_quantizer = Quantiser(method)
        tunerkit.unwrap(tunerkit.wrap(model, "toy-low-rank", {"targets": ["0"]}))
        found.append(not hasattr(model, "hf_quantizer"))
    assert found == forgotten
