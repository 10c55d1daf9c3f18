"""What core asks of a kind with a packed weight, and what it says of packed weights that no kind knows."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunerkit
from tests.support.toys import answering, registering
from tunerkit.plugin import BaseLayer, Packing, Rounding
from tunerkit.serialization.fingerprint import fingerprint
from tunerkit.serialization.packed_layers import warn_of_rounding
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, trainable
from tunerkit_testing.toy_methods import LowRankPlugin, ShiftPlugin

TARGETS: dict[str, Any] = {"targets": ["0", "2"]}


class Code:
    """What a library may put beside a weight: no tensor, no parameter."""

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.integers = (weight / self.scale).round()


class CodedLinear(nn.Module):
    """x Wᵀ + b, with W in an object that torch does not know."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.code = Code(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.code.integers * self.code.scale, self.bias)


@attrs.frozen(eq=False)
class BareLayer(BaseLayer):
    """`CodedLinear` as a base layer that says that it is packed, and no more."""

    module: Any

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module) is CodedLinear

    @property
    def packing(self) -> Packing:
        return Packing("coded int8", 8)

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        return F.linear(F.dropout(x, dropout), q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        return F.linear(h, p)

    def dense(self) -> Tensor:
        return self.module.code.integers * self.module.code.scale  # type: ignore[no-any-return]

    def pack(self, weight: Tensor) -> Tensor:
        return weight


class CodedLayer(BareLayer):
    """The same, with what merging and unwrapping need."""

    def merged(self, delta: Tensor) -> dict[str, Any]:
        return {"code": Code(self.dense() + delta)}

    def put_(self, stored: Mapping[str, Any]) -> None:
        vars(self.module).update(stored)

    def rounded(self, before: Tensor, delta: Tensor, others: Iterable[Rounding]) -> Rounding:
        error = float((self.dense() - before - delta).norm() / (before + delta).norm())
        return Rounding("coded int8", 8, added=error, own=0.0, change=float(len(list(others))))

    def unpacked(self, weight: Tensor) -> nn.Module:
        linear = nn.Linear(self.in_features, self.out_features)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = nn.Parameter(self.module.bias.detach().clone(), requires_grad=False)
        return linear


class Noting:
    """Notes the layers that are left when the adapters are out."""

    def __init__(self) -> None:
        self.left: list[list[str]] = []

    @tunerkit.hookimpl
    def tunerkit_unwrapped(self, model: nn.Module) -> None:
        self.left.append([type(each).__name__ for each in model.children()])


_methods = registering(LowRankPlugin(), ShiftPlugin())


def coded() -> Any:
    model: Any = net()
    model[0], model[2] = CodedLinear(model[0]), CodedLinear(model[2])
    return model


def dequantised() -> Any:
    model: Any = net()
    for i in (0, 2):
        model[i].weight.data = CodedLayer(coded()[i]).dense()
    return model


def with_adapters(model: Any) -> Any:
    """Two adapters and a trained bias, the same for every base."""
    tunerkit.wrap(model, "toy-low-rank", {**TARGETS, "bias": "adapters"}, seed=0)
    tunerkit.wrap(model, "toy-low-rank", TARGETS, seed=1, adapter="second")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def test_a_merge_into_few_bits_is_warned_of() -> None:
    """Four or fewer: what rounding adds may be as large as what the adapters changed."""
    found = [Rounding(f"coded int{bits}", bits, added=0.1, own=0.1, change=0.1) for bits in (5, 4, 8)]
    with pytest.warns(tunerkit.TunerkitWarning, match=r"merged into 1 weight matrices of 4 bits \(coded int4\)"):
        warn_of_rounding(found)


def test_a_merge_puts_what_the_kind_stores_and_takes_it_back() -> None:
    """The very objects; what it has rounded is noted in the order of the layers, and forgotten with the merge."""
    with registered(answering("tunerkit_base_layers", [CodedLayer])):
        model = with_adapters(coded())
        objects, output = [model[0].code, model[2].code], model(X)
        tunerkit.merge(model)
        merged = [model[0].code, model[2].code]
        assert (model(X) - output).abs().max() <= 0.05 * output.abs().max()
        assert [each.change for each in tunerkit.rounding(model).values()] == [0.0, 1.0]
        with tunerkit.disabled(model):
            assert [model[0].code, model[2].code] == objects
        assert [model[0].code, model[2].code] == merged
        tunerkit.unmerge(model)
        assert [model[0].code, model[2].code] == objects
        assert torch.equal(model(X), output)
        assert tunerkit.rounding(model) == {}


def test_files_describe_a_packed_weight_by_its_shape_alone(tmp_path: Path) -> None:
    """Under the name of the dense weight, so that a file fits either; merged or not."""
    with registered(answering("tunerkit_base_layers", [CodedLayer])):
        model = with_adapters(coded())
        found = fingerprint(tunerkit.tuner(model, "second"))
        assert found["0.weight"] == {
            "shape": [model[0].out_features, model[0].in_features],
            "dtype": "coded int8",
            "sample": [],
        }
        assert fingerprint(tunerkit.tuner(tunerkit.merge(model), "second")) == found
        path = tunerkit.save(model, tmp_path, adapter="second")
        with pytest.warns(tunerkit.TunerkitWarning, match="2 layers: coded int8 -> float32"):
            tunerkit.load(net(), path)


def test_dense_layers_hold_what_merging_into_the_dequantised_base_gives() -> None:
    """Bit for bit, with several adapters and a trained bias; the model's libraries are told once more at the end."""
    plugin = Noting()
    with registered(answering("tunerkit_base_layers", [CodedLayer]), plugin):
        model = tunerkit.unwrap(with_adapters(coded()), keep_merged=True, dtype=torch.float32)
        assert plugin.left == [["CodedLinear", "Tanh"] * 2 + ["Linear"], ["Linear", "Tanh"] * 2 + ["Linear"]]
    expected = tunerkit.unwrap(with_adapters(dequantised()), keep_merged=True).state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_kind_that_says_no_more_than_that_it_is_packed_is_refused() -> None:
    """It trains; a merge names the class that it should derive from, and changes nothing."""
    with registered(answering("tunerkit_base_layers", [BareLayer])):
        model = with_adapters(coded())
        objects = [model[0].code, model[2].code]
        with pytest.raises(tunerkit.errors.AdapterError, match=r"into '0': .*coded int8.*define merged, put_ and"):
            tunerkit.merge(model)
        assert [model[0].code, model[2].code] == objects
        assert not tunerkit.rounding(model)


def test_a_name_that_is_elsewhere_now_says_where() -> None:
    """Also where it is imported, which would lose an AttributeError's text."""
    with pytest.raises(ImportError, match=r'write from tunerkit_quant import PackedLinear \(pip install .*"tunerkit\['):
        from tunerkit import PackedLinear  # type: ignore[attr-defined]  # noqa: F401


def test_a_quantised_layer_without_a_kind_names_its_library_and_the_plugin() -> None:
    """The class is recognised by its module's name; nothing of the library is imported."""
    library: Any = type("Linear4bit", (nn.Module,), {"__module__": "bitsandbytes.nn.modules"})
    model: Any = net()
    model[0] = library()
    model[0].in_features = model[0].out_features = 8
    # An installed tunerkit-quant knows the library, though not this class that only carries its name.
    way = (
        "install tunerkit-quant, or a version of it"
        if find_spec("tunerkit_quant")
        else "tunerkit-quant is not installed"
    )
    with pytest.raises(tunerkit.errors.TargetError, match=rf'bitsandbytes has quantized.*{way}.*"tunerkit\[quant\]"'):
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["0"]})


class Wrapper(Tensor):
    """A weight made of other tensors, as torchao's are, in place after the model was wrapped."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None


def test_a_base_that_is_quantised_after_wrapping_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Where the weight alone was replaced, and where the layer was."""
    for change in ("weight", "layer"):
        model: Any = tunerkit.wrap(net(), "toy-low-rank", TARGETS)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        if change == "weight":
            own = model[0].weight.detach().as_subclass(Wrapper)
            model[0]._parameters["weight"] = own
            words = "quantized after wrapping"
        else:
            model[0] = CodedLinear(model[0])
            words = "is not in the model any more"
        for call in (
            lambda: tunerkit.attach(model, optimizer),  # noqa: B023  # called at once
            lambda: tunerkit.save(model, tmp_path),  # noqa: B023
            lambda: tunerkit.merge(model),  # noqa: B023
        ):
            with pytest.raises(tunerkit.errors.AdapterError, match=words):
                call()
