"""Engines that shard weights and kinds of packed weights: each refusal of the table, in words, and nothing silent."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import AdapterError, TargetError
from tunerkit.injection import is_merged
from tunerkit.libraries import ENGINES

if TYPE_CHECKING:
    from tests.support.toys import Toys

VERBS = ("wrap", "attach", "save", "merge")
TARGETS = {"targets": ["layers.0", "layers.1"]}


def partitioned_(model: nn.Module) -> nn.Module:
    """Do what an engine with ZeRO-3 does: number parameters, keep the shape aside, empty the tensor, mark modules.

    A stand-in: DeepSpeed is not installed here. It sets these attributes on each parameter and each module.
    """
    for module in model.modules():
        vars(module)["_original_parameters"] = {}
    for number, parameter in enumerate(model.parameters()):
        kept = {"ds_id": number, "ds_shape": parameter.shape, "ds_status": "NOT_AVAILABLE", "ds_tensor": parameter.data}
        vars(parameter).update(kept)
        parameter.data = torch.empty(0)
    return model


def refused(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    """``call`` raises ``error``, and its message has all ``words``."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_every_row_refuses_known_verbs_in_words() -> None:
    """A verb that nobody asks about would never be refused, and a row needs a way to be recognised and a way out."""
    for engine in ENGINES:
        assert engine.refused
        assert set(engine.refused) <= set(VERBS)
        assert engine.classes or engine.marks
        assert all(40 < len(text) < 250 for text in engine.refused.values())


def test_partitioned_weights_are_neither_wrapped_nor_saved_nor_merged(toys: "Toys", tmp_path: Path) -> None:
    """ZeRO-3 leaves parameters of shape (0,): a file would hold these, and there would be nothing to merge into."""
    net = partitioned_(toys.net())
    refused(lambda: tunerkit.wrap(net, "toy-low-rank", TARGETS), AdapterError, "DeepSpeed", "Wrap the model first")
    model = partitioned_(toys.trained(targets=TARGETS["targets"]))
    refused(lambda: tunerkit.save(model, tmp_path / "out"), AdapterError, "holds a shard", "call tunerkit.attach")
    refused(lambda: tunerkit.merge(model), AdapterError, "ZeRO-3", "partitions", "Save the adapter in every process")
    assert not (tmp_path / "out").exists()


def test_a_base_quantised_by_torchao_needs_a_plugin(toys: "Toys") -> None:
    """Its layers look like linear ones and train, but their weights support neither samples nor an addition."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if importlib.util.find_spec("tunerkit_quant") is not None:
        pytest.skip("tunerkit-quant adapts it")
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    before = list(net.state_dict())
    refused(
        lambda: tunerkit.wrap(net, "toy-low-rank", {"targets": ["0"]}), TargetError, "torchao", "install tunerkit-quant"
    )
    assert list(net.state_dict()) == before


def test_a_base_quantised_by_torchao_after_wrapping_is_refused(toys: "Toys") -> None:
    """Torchao replaces the weight in the module, which stays the same, and so do the hooks of its adapter."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tunerkit.wrap(nn.Sequential(nn.Linear(64, 64)), "toy-low-rank", {"targets": ["0"]})
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, path: path == "0")
    refused(lambda: tunerkit.save(model, "never"), AdapterError, "quantised after it had been adapted")
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


@pytest.mark.parametrize("form", ["the model", "around it", "inside it"])
def test_a_model_with_adapters_of_peft_is_named_as_one(toys: "Toys", form: str) -> None:
    """Without the refusal, tunerkit would adapt peft's own layers. What the message advises can be wrapped."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(toys.net(), peft.LoraConfig(target_modules=["layers.0"]))
    model = {"the model": wrapped, "around it": nn.Sequential(wrapped), "inside it": wrapped.base_model.model}[form]
    where = {"the model": "in the model itself", "around it": "at '0'", "inside it": "at 'layers.0'"}[form]
    refused(
        lambda: tunerkit.wrap(model, "toy-low-rank", {"targets": "all-linear"}),
        AdapterError,
        "this is a PeftModel",
        where,
        "merge_and_unload()",
    )
    unloaded = tunerkit.wrap(wrapped.merge_and_unload(), "toy-low-rank", TARGETS)
    assert list(tunerkit.tuner(unloaded).adapters()) == TARGETS["targets"]


def test_adapters_of_peft_on_top_are_named(toys: "Toys", tmp_path: Path) -> None:
    """Peft replaces layers of the wrapped model, so the file would fit no base. Without peft's, all works again."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = toys.trained(targets=TARGETS["targets"])
    optimizer = torch.optim.SGD(list(tunerkit.tuner(model).parameters()), lr=0.1)
    twice = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv"]))
    for call in (
        lambda: tunerkit.save(model, tmp_path / "out"),
        lambda: tunerkit.attach(model, optimizer),
    ):
        refused(call, AdapterError, "peft has put layers of its own", "unload()")
    assert not (tmp_path / "out").exists()
    tunerkit.save(twice.unload(), tmp_path / "out")


def test_recognising_engines_imports_none_of_them(toys: "Toys") -> None:
    """Classes are compared by name, so that core depends on no library of an engine."""
    loaded = set(sys.modules)
    tunerkit.merge(toys.trained(targets=TARGETS["targets"]))
    new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
    assert not new & {"peft", "torchao", "deepspeed", "bitsandbytes", "optimum"}
