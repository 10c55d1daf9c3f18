"""Merging into packed weights through a plugin's kind: it takes effect, or it is rejected and nothing changes."""

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunerkit
from tests.support.toys import Toys, answering
from tunerkit.errors import AdapterError
from tunerkit.injection import is_merged
from tunerkit.plugin import BaseLayer
from tunerkit_testing.registering import registered


class Packed(nn.Module):
    """A linear layer whose weight is stored as ``integers / steps``, with 2 * ``steps`` + 1 different values."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.steps = 6, 4, steps
        values = torch.linspace(-1, 1, 24).reshape(4, 6)
        self.weight = nn.Parameter((values * steps).round().to(torch.int16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float() / self.steps)


@attrs.frozen(eq=False)
class PackedLayer(BaseLayer):
    """`Packed` as a base layer. A delta is packed as the weight is; in ``real`` units it is not."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module) is Packed

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        return F.linear(x, q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        return F.linear(h, p)

    def dense(self) -> Tensor:
        return self.module.weight.float() / self.module.steps  # type: ignore[operator, union-attr, arg-type]

    def pack(self, weight: Tensor) -> Tensor:
        return (weight * self.module.steps).round()  # type: ignore[operator]


class NaiveLayer(PackedLayer):
    """Its `pack` forgets the steps, so that a small delta is rounded away."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight


@pytest.fixture(params=[PackedLayer], autouse=True)
def _kind(request: pytest.FixtureRequest, toys: "Toys") -> Iterator[None]:
    with registered(answering("tunerkit_base_layers", [request.param])):
        yield


packed_naively = pytest.mark.parametrize("_kind", [NaiveLayer], indirect=True)


def trained(toys: "Toys", steps: int = 1000, *, size: float = 0.05) -> Any:
    """A plain and a packed layer with adapters of a given size."""
    net = nn.Sequential(nn.Linear(6, 6), Packed(steps))
    model = tunerkit.wrap(net, "toy-low-rank", {"targets": ["0", "1"]}, seed=1)
    toys.fill_(model)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.mul_(size / parameter.norm())
    return model


@packed_naively
@pytest.mark.parametrize("permanent", [False, True])
def test_a_merge_without_effect_is_rejected_and_changes_nothing(toys: "Toys", permanent: bool) -> None:
    """The integers would stay the same, and the adapter would be lost; the plain layer before it is restored too."""
    model = trained(toys)
    before, x = toys.snapshot(model), torch.ones(2, 6)
    output = model(x)
    with pytest.raises(AdapterError, match=r"cannot merge into '1': its Packed stores the weight in a packed form"):
        tunerkit.merge(model, permanent=permanent)
    after = toys.snapshot(model)
    for each in (before, after):  # the detector's are gone after a forward
        del each["hooks"], each["attributes"]
    assert toys.same(after, before)
    assert torch.equal(model(x), output)


def test_packing_may_round_the_delta_but_not_away(toys: "Toys") -> None:
    """A large delta survives within the packing's own error, and is undone; with few values a small one is lost."""
    model, x = trained(toys, size=1.0), torch.ones(2, 6)
    output, integers = model(x), model[1].weight.clone()
    assert torch.allclose(tunerkit.merge(model)(x), output, atol=0.02)
    assert not torch.equal(model[1].weight, integers)
    assert torch.equal(tunerkit.unmerge(model)[1].weight, integers)
    with pytest.raises(AdapterError, match="had no effect"):
        tunerkit.merge(trained(toys, 8, size=0.05))


@packed_naively
def test_an_adapter_that_adds_nothing_may_be_merged(toys: "Toys") -> None:
    """There is no effect to lose."""
    net = nn.Sequential(Packed(1000))
    assert is_merged(tunerkit.merge(tunerkit.wrap(net, "toy-low-rank", {"targets": ["0"]})))


class Stubborn(Tensor):
    """A weight that ignores what is assigned to its data, as wrapper subclasses of quantisers do."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Ignore it."""


def test_a_weight_that_ignores_what_is_assigned_is_found(toys: "Toys") -> None:
    """Its class is known to nobody: only reading the weight again shows that nothing happened."""
    model = toys.trained(targets=["layers.0", "layers.1"])
    layer = model.layers[1]
    layer._parameters["weight"] = layer.weight.detach().as_subclass(Stubborn)
    before = layer.weight.clone()
    with pytest.raises(AdapterError, match=r"cannot merge into 'layers\.1'"):
        tunerkit.merge(model)
    assert torch.equal(layer.weight, before)


class Normed(nn.Module):
    """A linear layer that computes its weight of two parameters, and has none named ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.length = nn.Parameter(torch.linspace(1, 2, 4)[:, None])
        self.direction = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.length * F.normalize(self.direction, dim=1))


class NormedLayer(PackedLayer):
    """`Normed` as a base layer that writes both."""

    module: Any

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module) is Normed

    def dense(self) -> Tensor:
        return (self.module.length * F.normalize(self.module.direction, dim=1)).detach()

    def merged(self, delta: Tensor) -> dict[str, Any]:
        weight = self.dense() + delta
        return {"length": weight.norm(dim=1, keepdim=True), "direction": weight}


def test_a_kind_may_merge_into_tensors_of_which_the_weight_is_computed(toys: "Toys") -> None:
    """There need be no tensor of the name that the kind declares."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    with registered(answering("tunerkit_base_layers", [NormedLayer])):
        model = toys.fill_(tunerkit.wrap(nn.Sequential(Normed()), "toy-low-rank", {"targets": ["0"]}, seed=1))
        output = model(x)
        assert toys.close(tunerkit.merge(model)(x), output)
        assert torch.equal(tunerkit.unmerge(model)(x), output)
