"""Biases and modules that are trained in full as copies: which ones can be, and their statistics."""

from typing import Any, cast

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.model_checks import losing, silent, untouched
from tests.support.toys import Running, Toys
from tunerkit.errors import TargetError, TunerkitWarning


def test_a_copy_of_weights_on_meta_is_refused(toys: "Toys") -> None:
    """There are no values to copy yet, so the copy would start from undefined weights."""
    model = toys.net()
    model.head.to("meta")
    with untouched(toys, model), pytest.raises(TargetError, match=r"'head\.0'.*meta"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["conv"], "train_modules": ["head"]})


def test_a_bias_that_cannot_be_trained_is_named(toys: "Toys") -> None:
    """bias='all' means every bias: one of attention, a recurrent layer, a tied layer or a custom norm is an error."""

    class OwnNorm(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mT).mT

    class OwnAttention(nn.MultiheadAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.out_proj(x)  # type: ignore[no-any-return]

    model = toys.net()
    model.attention = OwnAttention(8, 2)
    model.other = nn.MultiheadAttention(8, 2)
    model.projection = model.other.out_proj
    model.recurrent = nn.LSTM(4, 4)
    model.own = OwnNorm(4)
    model.one, model.two = nn.Linear(2, 2), nn.Linear(2, 2)
    model.two.bias = model.one.bias
    with untouched(toys, model), pytest.raises(TargetError) as caught:
        tunerkit.wrap(model, "toy-shift", {"targets": ["conv"], "bias": "all"})
    for name in ("attention.in_proj_bias", "attention.out_proj.bias", "recurrent.bias_ih_l0", "own.bias", "one.bias"):
        assert name in str(caught.value)
    assert "other.in_proj_bias" not in str(caught.value)
    assert "other.out_proj.bias" in str(caught.value)
    assert "layers" not in str(caught.value)
    tunerkit.wrap(model, "toy-shift", {"targets": ["conv"], "bias": "adapters"})


@pytest.mark.parametrize(
    "make", [nn.Sequential, lambda *m: nn.ModuleList(m), lambda *m: nn.ModuleDict({"a": m[0], "b": m[1]})]
)
def test_a_container_is_trained_by_what_it_holds(toys: "Toys", make: Any) -> None:
    """A container runs its children, so it cannot be copied as a whole: each child is copied instead."""

    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        x = model.body(x)
        for module in model.head.values() if isinstance(model.head, nn.ModuleDict) else model.head:
            x = module(x)
        return x

    head = make(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    model, x = Running(run, body=nn.Linear(4, 4), head=head), torch.rand(3, 4)
    output = model(x)
    tunerkit.wrap(model, "toy-shift", {"targets": ["body"], "train_modules": ["head"]})
    assert torch.equal(model(x), output)
    losing(model, x).backward()
    assert len([p for name, p in model.named_parameters() if ".copy." in name and p.grad is not None]) == 4


def test_a_container_with_parameters_of_its_own_is_refused(toys: "Toys") -> None:
    """Copies of a container's children cannot include the container's own parameters."""

    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(8, 3))
            self.scale = nn.Parameter(torch.ones(()))

    model = toys.net()
    model.head = Scaled()
    with untouched(toys, model), pytest.raises(TargetError, match="its own parameters"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["conv"], "train_modules": ["head"]})


def test_changing_statistics_of_the_base_trigger_a_warning(toys: "Toys") -> None:
    """A batch norm in the frozen base updates its statistics in training; one warning counts such layers, if any."""
    model = nn.Sequential(
        toys.net(batch_norm=True), toys.net(batch_norm=True), nn.BatchNorm1d(3, track_running_stats=False)
    )
    with pytest.warns(TunerkitWarning, match="^2 normalization layers") as told:
        tunerkit.wrap(model, "toy-shift", {"targets": ["conv"]})
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_statistics_of_a_copy_trigger_no_warning(toys: "Toys", norm: nn.Module) -> None:
    """A module that this adapter or an earlier one trains in full is saved in a file, statistics included."""
    model = toys.net()
    model.batch_norm = norm
    config = {"targets": ["conv"], "train_modules": ["batch_norm"]}
    with silent():
        tunerkit.wrap(model, "toy-shift", config)
        if isinstance(norm, nn.BatchNorm2d):
            tunerkit.wrap(model, "toy-shift", {"targets": ["layers.0"]}, adapter="second")


def test_statistics_of_a_copy_are_trained_and_those_of_its_base_stay(toys: "Toys") -> None:
    """A batch norm trained in full updates the statistics of its copy, never those of the base, without a warning."""
    model = toys.net(batch_norm=True)
    before = toys.snapshot(model)
    config = {"targets": ["conv"], "train_modules": ["batch_norm"]}
    with silent():
        tunerkit.wrap(model, "toy-shift", config)
    copied: Any = model.get_submodule("batch_norm.tunerkit.default.copy")
    for _ in range(2):
        model.train()(toys.x())
    with tunerkit.disabled(model):
        model(toys.x())
    assert not torch.equal(copied.running_mean, before["values"]["batch_norm.running_mean"])
    assert int(copied.num_batches_tracked) == 2
    tunerkit.unwrap(model.eval())
    assert toys.same(toys.snapshot(model), before)
    assert model.batch_norm.track_running_stats


@pytest.mark.parametrize("named", ["model.layers.1", "self_attn", "model.layers"])
def test_blocks_are_trained_by_their_layers_so_that_a_cache_is_filled_once(named: str) -> None:
    """A copy of attention would run after its original, and put its keys into the cache a second time."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    ids = torch.arange(6)[None]
    before = model(ids, use_cache=True).logits
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["lm_head"], "train_modules": [named]})
    assert torch.equal(model(ids, use_cache=True).logits, before)
    copies = [copied.path for copied in tunerkit.tuner(model).copies]
    assert "model.layers.1.self_attn.q_proj" in copies
    assert "model.layers.1" not in copies


class Mixer(nn.Module):
    """A module with a parameter beside its layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.gate * self.inner(x))


def test_a_module_in_a_block_with_parameters_beside_its_layers_is_copied_whole_with_a_warning() -> None:
    """Its forward uses its own parameters, so it cannot be trained by its layers alone."""
    layers = nn.ModuleList([Mixer(nn.Linear(4, 4)), Mixer(nn.Linear(4, 4))])
    body = Running(lambda m, x: m.out(m.layers[1](m.layers[0](x))), layers=layers, out=nn.Linear(4, 4))
    with pytest.warns(tunerkit.TunerkitWarning, match=r"parameters beside their layers: layers\.1\. .*use_cache=False"):
        model = tunerkit.wrap(body, "toy-low-rank", {"targets": ["out"], "train_modules": ["layers.1"]})
    assert [copied.path for copied in tunerkit.tuner(model).copies] == ["layers.1"]


@pytest.mark.usefixtures("toys")
def test_a_module_that_blocks_share_is_trained_once_with_the_one_that_is_copied_whole() -> None:
    """It is found first in another block, and so before the module whose copy holds a copy of it."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"layers": nn.ModuleList([shared, Mixer(shared)]), "out": nn.Linear(4, 4)})
    with pytest.warns(tunerkit.TunerkitWarning, match=r"parameters beside their layers: layers\.1\. "):
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["out"], "train_modules": ["layers.1"]})
    assert [copied.path for copied in tunerkit.tuner(model).copies] == ["layers.1"]
