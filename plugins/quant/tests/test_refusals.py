"""Quantised layers that cannot be trained on, or not as they are: one error each, before the first step."""

import copy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from plugins.quant.tests.quantised import (
    MODELS,
    TARGETS,
    X,
    dense,
    hqq,
    int8,
    nf4,
    quanto,
    skip_without_library,
    torchao_int8,
)
from tunerkit_quant import versions

LORA = "lora"
CONFIG: dict[str, Any] = {"rank": 2, "targets": list(TARGETS)}


@pytest.fixture(autouse=True)
def _needs_a_method() -> None:
    pytest.importorskip("tunerkit_lora")


def refused(model: nn.Module, words: str) -> None:
    """Wrapping raises one `TargetError`, and changes nothing."""
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(tunerkit.errors.TargetError, match=words):
        tunerkit.wrap(model, LORA, CONFIG)
    assert [name for name, _ in model.named_modules()] == names


def test_no_library_is_imported_without_its_layers() -> None:
    """Seven kinds are asked about a plain model, and none imports anything."""
    script = (
        "import sys, torch, tunerkit; from torch import nn\n"
        f"tunerkit.wrap(nn.Sequential(nn.Linear(4, 4)), {LORA!r}, {{'targets': ['0']}})\n"
        "names = {'bitsandbytes', 'torchao', 'hqq', 'optimum', 'gptqmodel', 'transformers'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_layers_that_are_not_quantised_yet() -> None:
    """Bitsandbytes quantises when a model moves to its device; before, its packed weight is a plain one."""
    bnb: Any = pytest.importorskip("bitsandbytes")
    for layer in (bnb.nn.LinearNF4(64, 128), bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)):
        model: Any = dense()
        model[0] = layer
        refused(model, "holds no quantised weight yet: move the model to its device first")
    model = dense()
    model[0] = bnb.nn.Linear8bitLt(64, 128)
    refused(model, "has_fp16_weights=False")


def test_a_4_bit_layer_that_this_cpu_repacked_for_inference() -> None:
    """It passes no gradient any more, and a loss that falls would hide that; also where it is no target."""
    pytest.importorskip("bitsandbytes")
    model: Any = nf4().eval()
    with torch.no_grad():
        model(X)
    if not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16")
    refused(model, "was repacked for inference by a forward in eval mode")
    with pytest.raises(tunerkit.errors.TargetError, match="was repacked"):
        tunerkit.wrap(model, LORA, {"targets": ["4"]})


def test_settings_of_bitsandbytes_come_back_with_unwrap() -> None:
    """Repacking is off while adapters are in, on every layer, and as before afterwards; a deep copy has its own."""
    pytest.importorskip("bitsandbytes")
    model: Any = nf4()
    model[2].support_avx512bf16_for_cpu = "mine"

    def found(model: Any) -> list[object]:
        return [model[int(path)].support_avx512bf16_for_cpu for path in TARGETS]

    before = found(model)
    tunerkit.wrap(model, LORA, {"targets": ["0"]})
    tunerkit.wrap(model, LORA, {"targets": ["0"]}, adapter="second")
    assert found(model) == [False, False]
    twin = copy.deepcopy(model)
    tunerkit.delete(model, "default")
    assert found(model) == [False, False]
    tunerkit.unwrap(model)
    assert found(model) == before
    assert found(twin) == [False, False]
    tunerkit.unwrap(twin)
    assert found(twin) == before


@pytest.mark.parametrize("name", MODELS)
def test_packed_shapes_that_do_not_unpack(name: str) -> None:
    """The layer says another size than its packed weight: an adapter would fit neither."""
    skip_without_library(name)
    model: Any = MODELS[name]()
    model[0].in_features = 32
    refused(model, r"packed weight of shape \(128, 64\), and its features say \(128, 32\)")
    model = MODELS[name]()
    model[0].out_features = 64
    refused(model, r"packed weight of shape \(128, 64\), and its features say \(64, 64\)")


def test_parts_of_a_packed_weight_that_do_not_fit_the_rest() -> None:
    """Its shape may be an attribute, which says nothing of the integers and scales."""
    pytest.importorskip("bitsandbytes")
    model: Any = nf4()
    model[0].weight.data = model[0].weight.data[:-1]
    refused(model, r"has 4095 packed bytes, and a packed weight of shape \(128, 64\) needs 4096")
    model = int8()
    model[0].weight.SCB = model[0].weight.SCB[:-1]
    refused(model, r"has 127 scales, and a packed weight of shape \(128, 64\) needs 128")
    pytest.importorskip("hqq")
    model = hqq()
    model[0].meta["shape"] = (64, 128)
    refused(model, r"packed weight of shape \(64, 128\), and its features say \(128, 64\)")
    pytest.importorskip("torchao")
    model = torchao_int8()
    model[0].weight.qdata = model[0].weight.qdata[:-1]
    refused(model, r"packed weight of shape \(127, 64\), and its features say \(128, 64\)")


def test_layers_that_quantise_their_input_too() -> None:
    """Torchao gives no gradient through it, and quanto's output is no plain tensor."""
    quantization = pytest.importorskip("torchao.quantization")
    model = dense()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    refused(model, "quantises its input too, and torchao passes no gradient")
    library: Any = pytest.importorskip("optimum.quanto")
    model = dense()
    library.quantize(model, weights=library.qint8, activations=library.qint8)
    library.freeze(model)
    refused(model, "quantises its input and its output too")


def test_a_class_of_torchao_that_nobody_tried() -> None:
    """It may pass no gradient, or a wrong one."""
    quantization = pytest.importorskip("torchao.quantization")
    model = dense(torch.bfloat16)
    quantization.quantize_(model, quantization.Float8WeightOnlyConfig())
    refused(model, "has a weight of torchao's class Float8Tensor")


def test_layers_of_quanto_that_are_not_frozen() -> None:
    """Their weights are quantised anew at each call."""
    library: Any = pytest.importorskip("optimum.quanto")
    model = dense()
    library.quantize(model, weights=library.qint8)
    refused(model, r"call optimum\.quanto\.freeze\(model\) first")


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_of_its_own_is_not_taken_for_the_library_s(name: str) -> None:
    """On the instance or in a subclass: it may do anything with the weight."""
    skip_without_library(name)
    make = MODELS[name]
    model = make()
    own = type(model[0])
    model[0].forward = lambda x: own.forward(model[0], x)
    refused(model, "has quantized, with its own forward, which may use the packed weight in other ways")
    model = make()
    model[0].__class__ = type("Sub", (own,), {"forward": lambda self, x: own.forward(self, x)})
    refused(model, "is a Sub that .* has quantized, with its own forward")


def test_kinds_may_be_mixed(tmp_path: Path) -> None:
    """One adapter over layers of two libraries: each is as its own kind sees it."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("optimum.quanto")

    def mixed() -> Any:
        model = int8()
        model[2] = quanto()[2]
        return model

    model = tunerkit.wrap(mixed(), LORA, CONFIG, seed=0)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.normal_(std=0.1)
    output = model.eval()(X)
    loaded = tunerkit.load(mixed(), tunerkit.save(model, tmp_path)).eval()
    assert torch.equal(loaded(X), output)
    tunerkit.merge(model)
    assert {each.stored_as for each in tunerkit.rounding(model).values()} == {"bitsandbytes int8", "quanto qint8"}
    tunerkit.unmerge(model)
    assert torch.equal(model(X), output)


def test_a_library_that_is_too_old_leaves_the_kinds_of_the_others_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names both versions; a model of another library is adapted meanwhile."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.40.1" if name == "bitsandbytes" else found(name))
    for make in (int8, nf4):
        refused(make(), r"needs bitsandbytes>=0\.45, and 0\.40\.1 is installed: upgrade it")
    assert tunerkit.tuner(tunerkit.wrap(torchao_int8(), LORA, CONFIG)).ranks()


def test_a_library_without_its_distribution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a copied folder: nobody can say whether its version works."""
    assert versions.too_old("no-such-distribution", (1, 2)) == (
        "needs no-such-distribution, which is not installed: install no-such-distribution>=1.2"
    )
    assert versions.too_old("torch", (2, 9)) is None


def test_a_model_that_is_quantised_after_wrapping_is_refused_before_the_first_step() -> None:
    """Torchao replaces weights, and quanto whole layers."""
    quantization = pytest.importorskip("torchao.quantization")
    library: Any = pytest.importorskip("optimum.quanto")
    for quantise in (
        lambda model: quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=_is_target),
        lambda model: library.quantize(model, weights=library.qint8, include=["0"]),
    ):
        model = tunerkit.wrap(dense(), LORA, CONFIG)
        optimizer = torch.optim.SGD(list(tunerkit.tuner(model).parameters()), lr=0.1)
        quantise(model)
        with pytest.raises(tunerkit.errors.AdapterError, match=r"quantized after|not in the model any more"):
            tunerkit.attach(model, optimizer)


def test_a_loop_that_attaches_nothing_is_told_of_it_by_the_first_forward() -> None:
    """LoRA needs no steps, so nobody has to attach it; the loss would fall, and `save` would refuse the adapter."""
    quantization = pytest.importorskip("torchao.quantization")
    library: Any = pytest.importorskip("optimum.quanto")
    for quantise in (
        lambda model: quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=_is_target),
        lambda model: library.quantize(model, weights=library.qint8, include=["0"]),
    ):
        model = tunerkit.wrap(dense(), LORA, CONFIG)
        quantise(model)
        for _ in range(2):
            with pytest.raises(tunerkit.errors.AdapterError, match=r"quantized after|not in the model any more"):
                model(X)


@pytest.mark.parametrize("bias", ["adapters", "all"])
def test_biases_that_are_no_parameters_are_named(bias: str) -> None:
    """HQQ's bias is an attribute. The head's, which is a parameter, is trained all the same."""
    pytest.importorskip("hqq")
    with pytest.warns(tunerkit.TunerkitWarning, match=r"the biases of 1 quantized layers are not trained.*: 0$"):
        model = tunerkit.wrap(hqq(), LORA, {**CONFIG, "bias": bias})
    assert [biased.path for biased in tunerkit.tuner(model).biases] == (["3", "4"] if bias == "all" else [])


def _is_target(module: nn.Module, path: str) -> bool:
    return path in TARGETS


def test_quantised_layers_are_not_trained_in_full() -> None:
    """A copy of integers cannot be trained, and would not be noticed."""
    pytest.importorskip("bitsandbytes")
    with pytest.raises(tunerkit.errors.TargetError, match="quantized LinearNF4, whose integers cannot be trained"):
        tunerkit.wrap(nf4(), LORA, {"targets": ["0"], "train_modules": ["2"]})
