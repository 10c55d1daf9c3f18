"""A base-layer kind whose weight is a buffer of integers: adapted, described in files, merged by its own packing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.toy_packed import Int8Layer, Int8Linear
from tests.support.toy_readers import DirectionPlugin, ScalePlugin
from tests.support.toy_shared import SharedPlugin
from tests.support.toy_starts import FittedPlugin
from tests.support.toys import answering, registering
from tunerkit.serialization.fingerprint import fingerprint
from tunerkit_testing.small import X, net, train, trainable
from tunerkit_testing.toy_methods import LowRankPlugin

METHODS = ("toy-low-rank", "toy-scale", "toy-direction", "toy-shared", "toy-inputs")
TARGETS: dict[str, Any] = {"targets": ["0", "2"]}


PLUGINS = (LowRankPlugin(), ScalePlugin(), DirectionPlugin(), SharedPlugin(), FittedPlugin())
_toys = registering(answering("tunerkit_base_layers", [Int8Layer]), *PLUGINS)


def packed() -> nn.Sequential:
    model = net()
    model[0], model[2] = Int8Linear(model[0]), Int8Linear(model[2])  # type: ignore[arg-type]
    return model


def trained(method: str, **config: Any) -> nn.Module:
    model = tunerkit.wrap(packed(), method, {**TARGETS, **config}, seed=0)
    assert torch.equal(model(X), packed()(X))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=20)
    losses = train(model, optimizer, 20)
    assert losses[-1] < losses[0]
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_it_and_leaves_the_base_as_it_is(method: str, tmp_path: Path) -> None:
    """The kind says how to read, add to and show its weight; no method knows of it."""
    model = trained(method)
    own = {name: tensor for name, tensor in state(model).items() if ".tunerkit." not in f".{name}"}
    assert same(own, state(packed()))
    loaded = tunerkit.load(packed(), tunerkit.save(model, tmp_path))
    assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("method", METHODS)
def test_it_merges_by_its_own_packing_and_unmerges_bit_for_bit(method: str, tmp_path: Path) -> None:
    """All buffers that `merged` returns are replaced; the error is that of rounding to 8 bits."""
    model = trained(method, bias="adapters")
    expected, before = model(X), state(model)
    tunerkit.merge(model)
    merged = state(model)
    assert {name for name in merged if not torch.equal(merged[name], before[name])} >= {"0.weight", "0.scale"}
    assert merged["0.weight"].dtype == torch.int8
    assert (model(X) - expected).abs().max() <= 0.03 * expected.abs().max()
    assert not torch.allclose(model(X), packed()(X), atol=1e-2)
    with tunerkit.disabled(model):
        assert torch.equal(model(X), packed()(X))
    loaded = tunerkit.load(packed(), tunerkit.save(model, tmp_path))
    assert torch.equal(loaded(X), expected)
    tunerkit.unmerge(model)
    assert same(state(model), before)
    assert torch.equal(model(X), expected)
    kept = tunerkit.unwrap(model, keep_merged=True)
    assert (kept(X) - expected).abs().max() <= 0.03 * expected.abs().max()
    assert list(kept.state_dict()) == list(packed().state_dict())


def test_the_fingerprint_has_what_the_weight_is_made_of(tmp_path: Path) -> None:
    """Another base is refused although all its parameters are the same, merged or not."""
    model = trained("toy-low-rank")
    found = fingerprint(tunerkit.tuner(model))
    assert {"0.weight", "0.scale", "0.bias", "4.weight"} <= found.keys()
    assert found["0.weight"]["dtype"] == "int8"
    tunerkit.merge(model)
    assert fingerprint(tunerkit.tuner(model)) == found
    path = tunerkit.save(model, tmp_path)
    for name in ("weight", "scale"):
        other = packed()
        other[0].get_buffer(name).view(-1)[0] += 1
        with pytest.raises(tunerkit.errors.BaseMismatchError, match=f"other values: 0.{name}"):
            tunerkit.load(other, path)
    with pytest.raises(tunerkit.errors.BaseMismatchError):
        tunerkit.load(net(), path)


def test_other_buffers_stay_out_of_fingerprints() -> None:
    """Statistics of norms change while training; only a target's own buffers tell which base it is."""
    model = nn.Sequential(packed(), nn.BatchNorm1d(3))
    config = {"targets": ["0.0"]}
    with pytest.warns(tunerkit.TunerkitWarning, match="running statistics"):
        model = tunerkit.wrap(model, "toy-low-rank", config)
    found = fingerprint(tunerkit.tuner(model))
    assert {"0.0.weight", "1.weight"} <= found.keys()
    assert found.keys().isdisjoint({"1.running_mean", "0.2.scale"})


def test_several_adapters_are_packed_once() -> None:
    """The kind is given the sum, so rounding does not add up."""
    model = tunerkit.wrap(trained("toy-low-rank"), "toy-scale", TARGETS, adapter="second")
    with torch.no_grad():
        for adapter in tunerkit.tuner(model, "second").adapters().values():
            adapter.get_parameter("l").add_(0.2)
    expected = model(X)
    tunerkit.merge(model)
    assert (model(X) - expected).abs().max() <= 0.03 * expected.abs().max()


def test_its_tensors_are_found_by_name() -> None:
    """`BaseLayer.tensor` finds parameters and buffers, and names what it was asked for otherwise."""
    model: Any = tunerkit.wrap(packed(), "toy-low-rank", TARGETS)
    base = model[0].tunerkit.base
    assert base.tensor("weight").dtype == torch.int8
    assert base.tensor("bias") is base.module.bias
    assert torch.equal(base.bias(), base.module.bias)
    with pytest.raises(tunerkit.errors.AdapterError, match="Int8Linear has no parameter or buffer named 'wieght'"):
        base.tensor("wieght")
