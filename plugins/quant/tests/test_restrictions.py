"""Weights that were packed after wrapping: nothing is merged into them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import AdapterError, TargetError
from tunerkit.injection import is_merged

if TYPE_CHECKING:
    from tests.support.toys import Toys

TARGETS = {"targets": ["layers.0", "layers.1"]}


def refused(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    """``call`` raises ``error``, and its message has all ``words``."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_base_quantised_by_torchao_after_wrapping_is_refused(toys: "Toys") -> None:
    """Torchao replaces the weight in the module, which stays the same, and so do the hooks of its adapter."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tunerkit.wrap(nn.Sequential(nn.Linear(64, 64)), "toy-low-rank", {"targets": ["0"]})
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, path: path == "0")
    refused(lambda: tunerkit.save(model, "never"), AdapterError, "quantized after wrapping")
    refused(lambda: tunerkit.merge(model), TargetError, "torchao", "tunerkit.merge on the unquantised base")


PACKED = [
    ("torchao.utils", "TorchAOBaseTensor", TargetError),
    ("bitsandbytes.nn.modules", "Int8Params", AdapterError),
    ("optimum.quanto.tensor.qtensor", "QTensor", AdapterError),
]


@pytest.mark.parametrize(("module", "name", "error"), PACKED)
def test_packed_weights_are_recognised_by_their_class(
    toys: "Toys", module: str, name: str, error: type[Exception]
) -> None:
    """A class that derives from the library's is enough. Merging is refused for all, before anything changes."""
    library: Any = type(name, (torch.Tensor,), {"__module__": module})
    model = toys.trained(targets=TARGETS["targets"])
    layer = model.layers[0]
    values = layer.weight.detach()
    layer._parameters["weight"] = values.as_subclass(type("Own", (library,), {}))
    refused(lambda: tunerkit.merge(model), error, "at 'layers.0.weight'", "packed")
    layer._parameters["weight"] = nn.Parameter(values)
    assert is_merged(tunerkit.merge(model))


def test_a_packed_layer_without_an_adapter_does_not_prevent_merging(toys: "Toys") -> None:
    """Only weights that a merge would change matter to it."""
    model = toys.trained(targets=["layers.0"])
    library: Any = type("QTensor", (torch.Tensor,), {"__module__": "optimum.quanto.tensor.qtensor"})
    model.conv._parameters["weight"] = model.conv.weight.detach().as_subclass(library)
    assert is_merged(tunerkit.merge(model))
