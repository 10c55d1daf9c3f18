"""Models that cannot be wrapped are refused in words and stay as they were."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.model_checks import pickled, silent, untouched
from tests.support.toys import Toys
from tunerkit.errors import AdapterError, TargetError, TunerkitWarning, UnknownMethodError


def test_a_model_inside_ddp_is_refused(toys: "Toys") -> None:
    """DDP has already registered its parameters: adapters added later would be trained unsynchronised."""
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = toys.net()
    for model in (parallel, nn.Sequential(parallel)):
        with untouched(toys, model), pytest.raises(AdapterError, match="DistributedDataParallel"):
            tunerkit.wrap(model, "toy-shift", {"targets": ["conv"]})


def test_a_model_that_is_itself_the_layer_is_refused_in_words(toys: "Toys") -> None:
    """A model that is a single layer has no submodule where an adapter could go."""
    for config in (None, {"targets": ["re:.*"]}, {"targets": ["*"]}, {"targets": ["weight"]}):
        model = nn.Linear(3, 3)
        with untouched(toys, model), pytest.raises(TargetError, match=r"no|nothing|only modules"):
            tunerkit.wrap(model, "toy-low-rank", config)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv1d(3, 3, 2), nn.Embedding(3, 3)])
def test_what_to_do_with_a_model_that_is_the_layer_is_said(toys: "Toys", layer: nn.Module, targets: Any) -> None:
    """The error advises to put the layer into a module, and following the advice works."""
    words = f"the {type(layer).__name__} itself: is the model.* nn\\.Sequential"
    with untouched(toys, layer), pytest.raises(TargetError, match=words):
        tunerkit.wrap(layer, "toy-low-rank", {"targets": targets})
    tunerkit.wrap(nn.Sequential(copy.deepcopy(layer)), "toy-low-rank", {"targets": ["0"]})


def test_an_attention_that_is_the_model_is_reported_as_left_out(toys: "Toys") -> None:
    """Its output projection is a submodule and gets an adapter; q, k and v are parameters of the model itself."""
    attention = nn.MultiheadAttention(8, 2)
    with pytest.warns(TunerkitWarning, match=r"the MultiheadAttention itself: is the model"):
        tunerkit.wrap(attention, "toy-low-rank")
    assert list(tunerkit.tuner(attention).ranks()) == ["out_proj"]


def test_a_part_and_a_whole_cannot_both_be_wrapped(toys: "Toys") -> None:
    """One model holds all adapters: neither a part of a wrapped model nor a model around it can be wrapped again."""
    model = toys.trained(targets=["layers.0", "head.0"])
    outer = nn.Sequential(model)
    with untouched(toys, outer):
        with pytest.raises(AdapterError, match="the Net inside it has adapters already"):
            tunerkit.wrap(outer, "toy-shift", adapter="other")
        with pytest.raises(AdapterError, match="the model that it is a part of has adapters already"):
            tunerkit.wrap(model.head, "toy-shift", {"targets": ["2"]}, adapter="other")


def test_a_model_with_an_attribute_where_adapters_go_is_refused(toys: "Toys") -> None:
    """A child or attribute called tunerkit would be overwritten: the error gives its path."""
    with_child, with_attribute = toys.net(), toys.net()
    with_child.head[0].add_module("tunerkit", nn.Linear(1, 1))
    with_attribute.head[0].tunerkit = 3
    for model in (with_child, with_attribute):
        with untouched(toys, model), pytest.raises(AdapterError, match=r"'head\.0'"):
            tunerkit.wrap(model, "toy-shift")


def test_wrapping_while_disabled_or_merged_is_refused(toys: "Toys", saved: Path) -> None:
    """While a model is disabled or merged, no adapter can be added, and none is removed by mistake."""
    model = toys.trained()
    with tunerkit.disabled(model), untouched(toys, model):
        with pytest.raises(AdapterError, match="disabled"):
            tunerkit.wrap(model, "toy-shift", adapter="other")
        with pytest.raises(AdapterError, match="disabled"):
            tunerkit.unwrap(model)
    tunerkit.merge(model)
    with untouched(toys, model):
        with pytest.raises(AdapterError, match="unmerge"):
            tunerkit.wrap(model, "toy-shift", adapter="other")
        with pytest.raises(AdapterError, match="unmerge"):
            tunerkit.load(model, saved, adapter="other")


def test_what_is_no_model_or_has_no_shape_yet_is_refused_in_words(toys: "Toys") -> None:
    """A name instead of a model, a lazy layer or a seed that is no number raises our error, and nothing is frozen."""
    with pytest.raises(tunerkit.errors.AdapterError, match=r"expected a torch\.nn\.Module, got str"):
        tunerkit.wrap("bert", "toy-shift")  # type: ignore[type-var]
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(tunerkit.errors.AdapterError, match="run one batch first"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["0"]})
    assert all(p.requires_grad for p in model.parameters())
    for seed in ("a", True, 2**70, -(2**64)):
        with pytest.raises(tunerkit.errors.ConfigError, match=rf"an int of 64 bits or None, .*{seed}.* @ seed"):
            tunerkit.wrap(toys.net(), "toy-shift", seed=seed)  # type: ignore[arg-type]
    with pytest.raises(UnknownMethodError, match=r"no method named \['toy-shift'\]; installed: .*toy-shift"):
        tunerkit.wrap(toys.net(), ["toy-shift"])  # type: ignore[arg-type]


def test_a_warning_raised_as_an_error_leaves_the_model_as_it_was(toys: "Toys") -> None:
    """Wrap issues its warnings before it changes anything."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with silent(Warning), pytest.raises(tunerkit.TunerkitWarning):
        tunerkit.wrap(model, "toy-shift", {"targets": ["0"]})
    assert list(model.state_dict()) == list(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_that_is_put_in_inside_inference_mode_can_be_trained(toys: "Toys", tmp_path: Path) -> None:
    """Wrapping and loading make normal tensors there, of copies and biases too."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    settings = {"targets": ["0"], "train_modules": ["1"], "bias": "adapters"}
    with torch.inference_mode():
        tunerkit.wrap(model, "toy-shift", settings)
    model(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    tunerkit.save(model, tmp_path, allow_nonfinite=True)
    tunerkit.unwrap(model)
    with torch.inference_mode():
        tunerkit.load(model, tmp_path, trainable=True)
    model(torch.ones(1, 3)).sum().backward()
    assert not any(p.is_inference() for p in model.parameters())


def test_a_base_that_was_built_inside_inference_mode_is_refused_for_training_only(toys: "Toys", tmp_path: Path) -> None:
    """Torch keeps no such weight for a backward pass; to predict with it is what the mode is for."""
    model = nn.Sequential(nn.Linear(3, 3))
    tunerkit.save(tunerkit.wrap(model, "toy-shift", {"targets": ["0"]}), tmp_path)
    with torch.inference_mode():
        other = nn.Sequential(nn.Linear(3, 3))
        other.load_state_dict(tunerkit.unwrap(model).state_dict())
    for call in (
        lambda: tunerkit.wrap(other, "toy-shift", {"targets": ["0"]}),
        lambda: tunerkit.load(other, tmp_path, trainable=True),
    ):
        with pytest.raises(AdapterError, match=r"built inside torch\.inference_mode.*0\.weight.*outside"):
            call()
    tunerkit.load(other, tmp_path)


class Open(nn.Module):
    """A model that drops what it does not know, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, **others: object) -> Tensor:
        found: Tensor = self.layer(x)
        return found


class Own(Open):
    """A model that has such an argument itself."""

    def forward(self, x: Tensor, adapter_names: object = None, **others: object) -> Tensor:  # type: ignore[override]
        assert adapter_names == ["a"]
        return super().forward(x)


def test_an_adapter_for_each_row_is_never_ignored(toys: "Toys") -> None:
    """The forward would drop it in silence. It is refused whatever is active, and in copies; not after unwrapping."""
    x = torch.ones(2, 3)
    model = tunerkit.wrap(Open(), "toy-low-rank", {"targets": ["layer"]})
    for each in (model, copy.deepcopy(model), pickled(model), nn.Sequential(model)[0]):
        with pytest.raises(AdapterError, match=r"adapter_names= would be ignored.*: write tunerkit\.activate\("):
            each(x, adapter_names=["a", "b"])
        assert torch.equal(each(x, adapter_names=None), each(x, other=1))
    tunerkit.unwrap(model)
    assert torch.equal(model(x, adapter_names=["a"]), model(x))


def test_a_model_with_that_argument_gets_it(toys: "Toys") -> None:
    """It is the model's own then."""
    model = tunerkit.wrap(Own(), "toy-low-rank", {"targets": ["layer"]})
    assert model(torch.ones(2, 3), adapter_names=["a"]).shape == (2, 3)


def test_the_refusal_costs_one_look_up_per_forward_of_the_model(toys: "Toys") -> None:
    """Nothing is added to a layer: the adapted one has the hook that applies adapters, and the model one before."""
    model = tunerkit.wrap(Open(), "toy-low-rank", {"targets": ["layer"]})
    model(torch.ones(2, 3))  # the watch of the first forward is over
    assert (len(model._forward_pre_hooks), len(model.layer._forward_pre_hooks)) == (1, 0)


def test_a_compiled_model_refuses_it_too(toys: "Toys") -> None:
    """The check is compiled into the model's own call."""
    model = tunerkit.wrap(Open(), "toy-low-rank", {"targets": ["layer"]})
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(torch.ones(2, 3)), model(torch.ones(2, 3)))
    with pytest.raises(Exception, match=r"tunerkit\.activate"):
        compiled(torch.ones(2, 3), adapter_names=["a"])
