"""Wrapping with toy methods: what changes, what stays the same, and which errors leave the model unchanged."""

import asyncio
import copy
import io
import pickle
import re
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import tunerkit
from tunerkit.errors import AdapterError, ConfigError, PluginError, TargetError, TunerkitWarning, UnknownMethodError
from tunerkit.hooks import gather_knowledge
from tunerkit.injection.unsynchronised import refuse_unsynchronised
from tunerkit.layers import as_base_layer
from tunerkit.layers.linear import LinearLayer
from tunerkit.libraries.torch_private import has_hook

if TYPE_CHECKING:
    from tests.conftest import Toys

BIASES = ("none", "adapters", "all")
LEGAL_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="./"), min_size=1, max_size=64)
ODD_NAMES = (
    "keys",
    "forward",
    "type",
    "training",
    "weight",
    "_modules",
    "default",
    "active",
    "enabled",
    "merged",
    "base",
)


@contextmanager
def registered(plugin: object) -> Iterator[None]:
    """An in-process plugin, registered inside the block."""
    tunerkit.register(plugin)
    try:
        yield
    finally:
        tunerkit.unregister(plugin)


@contextmanager
def untouched(toys: "Toys", model: nn.Module) -> Iterator[None]:
    """Check that the model is unchanged after the block, whatever happens inside."""
    before = toys.snapshot(model)
    yield
    assert toys.same(toys.snapshot(model), before)


def losing(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()  # type: ignore[no-any-return]


# What wrapping keeps


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
@pytest.mark.parametrize("training", [False, True])
def test_the_base_keeps_its_keys_its_types_and_its_output(toys: "Toys", method: str, bias: str, training: bool) -> None:
    """Wrapping returns the same object; its keys, types, values and first output are the base's, bit for bit."""
    model = toys.net().train(training)
    before, output = toys.snapshot(model), model(toys.x())
    assert tunerkit.wrap(model, method, {**toys.full, "bias": bias}) is model
    after = toys.snapshot(model)
    assert torch.equal(model(toys.x()), output)
    assert [key for key in after["keys"] if ".tunerkit." not in key] == before["keys"]
    for what in ("types", "identity"):
        assert {name: after[what][name] for name in before[what]} == before[what]
    assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("bias", BIASES)
def test_exactly_adapters_copies_and_biases_are_trained(toys: "Toys", bias: str) -> None:
    """Only the targets' adapters, the copies' parameters and the requested biases require gradients."""
    model = tunerkit.wrap(toys.net(), "toy-low-rank", {**toys.full, "bias": bias})
    targets = {"conv", "layers.0", "layers.1"}
    biased = {"none": set(), "adapters": targets, "all": {*targets, "group_norm", "norm"}}[bias]
    expected = {f"{path}.tunerkit.default.adapter.{name}" for path in targets for name in "ab"}
    expected |= {f"head.{i}.tunerkit.default.copy.{name}" for i in (0, 2) for name in ("weight", "bias")}
    expected |= {f"{path}.tunerkit.default.bias" for path in biased}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


def test_every_trained_part_reaches_the_output(toys: "Toys") -> None:
    """After backward every trained parameter has a gradient, and no base parameter has one."""
    model = toys.trained()
    losing(model, toys.x()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) is (".tunerkit." in name), name


def test_adapters_are_in_fp32_unless_asked_and_biases_in_the_bases_dtype(toys: "Toys") -> None:
    """``adapter_dtype`` applies only to the method's adapters; copies and biases keep the base's dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        config = {**toys.full, "adapter_dtype": str(dtype).removeprefix("torch.")}
        model = tunerkit.wrap(toys.net().double(), "toy-low-rank", config)
        assert {p.dtype for a in tunerkit.tuner(model).adapters().values() for p in a.parameters()} == {dtype}
        assert {p.dtype for name, p in model.named_parameters() if ".adapter." not in name} == {torch.float64}


def test_two_adapters_both_count(toys: "Toys") -> None:
    """The effects of two adapters add up, also with trained biases: each adds its own difference to the base."""
    config = {"targets": ["layers.1"], "bias": "adapters"}
    model = toys.net()
    first = tunerkit.wrap(toys.net(), "toy-low-rank", config, adapter="one", seed=1)
    second = tunerkit.wrap(toys.net(), "toy-shift", config, adapter="two")
    both = tunerkit.wrap(
        tunerkit.wrap(toys.net(), "toy-low-rank", config, adapter="one", seed=1), "toy-shift", config, adapter="two"
    )
    for wrapped in (first, second, both):
        for name, parameter in wrapped.named_parameters():
            if ".tunerkit." in name and parameter.requires_grad:
                parameter.data += 0.1 * len(name.split(".")[-1]) + (0.2 if ".two." in name else 0.0)
    h = torch.rand(5, 8)
    layer = [m.get_submodule("layers.1") for m in (model, first, second, both)]
    base, one, two, all_of_it = (each(h) for each in layer)
    assert not torch.allclose(one, two)
    assert toys.close(all_of_it, one + two - base)


# Configs and seeds


def test_config_may_be_an_object_a_mapping_or_nothing(toys: "Toys") -> None:
    """The three ways to pass the same config give the same adapters."""
    config = tunerkit.structure("toy-low-rank", {"rank": 2})
    for given_config in (config, {"rank": 2}, {}, None):
        model = tunerkit.wrap(toys.net(), "toy-low-rank", given_config)
        assert tunerkit.tuner(model).config == config
        assert tunerkit.tuner(model).ranks() == {"layers.0": 2, "layers.1": 2}


@pytest.mark.parametrize(
    ("method", "config", "error", "words"),
    [
        ("toy-low-rnk", None, UnknownMethodError, "did you mean 'toy-low-rank'"),
        ("toy-low-rank", {"rnk": 3}, ConfigError, r"rank"),
        ("toy-low-rank", {"rank": "3"}, ConfigError, r"\$.rank"),
        ("toy-low-rank", {"targets": ["layrs.0"]}, TargetError, "did you mean"),
        ("toy-low-rank", {"train_modules": ["haed"]}, TargetError, "did you mean 'head'"),
        ("toy-low-rank", {"train_modules": ["head.1"]}, TargetError, "holds nothing to train"),
        ("toy-low-rank", 3, ConfigError, "LowRankConfig, a mapping or None, got int"),
        ("toy-low-rank", "rank=3", ConfigError, "LowRankConfig, a mapping or None, got str"),
        ("toy-low-rank", {"targets": ["norm"]}, TargetError, "LayerNorm"),
    ],
)
def test_bad_input_is_refused_in_words(
    toys: "Toys", method: str, config: Any, error: type[Exception], words: str
) -> None:
    """An unknown method, key, target or value, or a config of the wrong class, raises one error that helps."""
    model = toys.net()
    with untouched(toys, model), pytest.raises(error, match=words):
        tunerkit.wrap(model, method, config)


def test_the_config_of_another_method_is_refused(toys: "Toys") -> None:
    """A config object must be of the method's own config class."""
    model = toys.net()
    with untouched(toys, model), pytest.raises(ConfigError, match=r"'toy-shift' takes ShiftConfig.* got LowRankConfig"):
        tunerkit.wrap(model, "toy-shift", tunerkit.structure("toy-low-rank", {}))


def test_a_seed_repeats_the_start_and_leaves_the_global_state_alone(toys: "Toys") -> None:
    """The same seed gives the same initial values, whatever the global random state.

    Without a seed they depend on that state.
    """

    def start(seed: int | None) -> torch.Tensor:
        model = tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["conv"]}, seed=seed)
        return model.get_parameter("conv.tunerkit.default.adapter.a").detach()

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = start(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(start(1), first)
    assert not torch.equal(start(2), first)
    torch.manual_seed(1)
    unseeded = start(None)
    assert not torch.equal(start(None), unseeded)


# Names


@given(name=LEGAL_NAMES)
@example(name="x" * 64)
@example(name="tunerkit")
@example(name="копия 🦜")
@settings(max_examples=12)
def test_any_legal_name_works_everywhere(toys: "Toys", name: str) -> None:
    """A name without "." and "/", up to 64 characters, works in wrap, training, merge, copies and unwrap."""
    model = toys.net()
    before = toys.snapshot(model)
    tunerkit.wrap(model, "toy-low-rank", toys.full, adapter=name)
    toys.fill_(model.train().eval())
    output = model(toys.x())
    assert not torch.equal(output, toys.net()(toys.x()))
    assert torch.equal(copy.deepcopy(model)(toys.x()), output)
    model.load_state_dict(model.state_dict())
    assert toys.close(tunerkit.merge(model)(toys.x()), output)
    assert torch.equal(tunerkit.unmerge(model)(toys.x()), output)
    assert tunerkit.tuner(model, name).name == name
    assert toys.same(toys.snapshot(tunerkit.unwrap(model)), before)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_torch_uses_works_everywhere(toys: "Toys", name: str) -> None:
    """Names of a module's own attributes and methods are legal, although add_module of torch rejects them."""
    test_any_legal_name_works_everywhere.hypothesis.inner_test(toys, name)  # type: ignore[attr-defined]
    model = pickle.loads(pickle.dumps(tunerkit.wrap(toys.net(), "toy-shift", toys.full, adapter=name)))
    assert torch.equal(model.double()(toys.x().double()), toys.net().double()(toys.x().double()))


@pytest.mark.parametrize("name", ["", "x" * 65, "a.b", ".", "a/b", "/", None, 3, b"x"])
def test_illegal_names_are_refused(toys: "Toys", name: Any) -> None:
    """Names that cannot be part of a parameter's name, and empty names, raise a clear error, also in load."""
    model = toys.net()
    with untouched(toys, model), pytest.raises(AdapterError, match="1 to 64 characters"):
        tunerkit.wrap(model, "toy-shift", adapter=name)
    with untouched(toys, model), pytest.raises(AdapterError, match="1 to 64 characters"):
        tunerkit.load(model, "nowhere", adapter=name)


def test_a_name_that_no_file_can_hold_is_refused(toys: "Toys") -> None:
    """Half a surrogate pair is a valid Python string but not valid UTF-8: the state_dict could never be saved."""
    model = toys.net()
    for name in ("\ud800", "a\udfff"):
        with untouched(toys, model), pytest.raises(AdapterError, match="half of a surrogate pair"):
            tunerkit.wrap(model, "toy-shift", adapter=name)


def test_a_taken_name_is_refused(toys: "Toys") -> None:
    """A second adapter needs a different name; the first is unaffected."""
    model = toys.trained()
    with untouched(toys, model), pytest.raises(AdapterError, match="'default' already"):
        tunerkit.wrap(model, "toy-shift")


# Models that cannot be wrapped


def test_a_model_inside_ddp_is_refused(toys: "Toys") -> None:
    """DDP has already registered its parameters: adapters added later would be trained unsynchronised."""
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = toys.net()
    for model in (parallel, nn.Sequential(parallel)):
        with untouched(toys, model), pytest.raises(AdapterError, match="DistributedDataParallel"):
            tunerkit.wrap(model, "toy-shift", {"targets": ["conv"]})


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    """A process group with this process only."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    parallel: nn.Module = nn.parallel.DistributedDataParallel(model)
    return parallel


INTO: dict[str, Callable[[Any, Path], object]] = {
    "its module": lambda model, path: tunerkit.wrap(model, "toy-low-rank"),
    "a part of it": lambda model, path: tunerkit.wrap(model.head, "toy-low-rank"),
    "what it is a part of": lambda model, path: tunerkit.wrap(nn.Sequential(model), "toy-low-rank"),
    "loaded": lambda model, path: tunerkit.load(model, path, trainable=True),
}


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("put", INTO.values(), ids=INTO)
def test_an_adapter_that_ddp_does_not_know_is_refused_at_its_first_forward(
    toys: "Toys", tmp_path: Path, put: Callable[[Any, Path], object]
) -> None:
    """Inside `ddp.module`, or around it, wrap cannot see DDP, which does not synchronise the new adapters.

    The error comes whatever ran before outside DDP, and again at each call, until the model is put into a new DDP.
    """
    path = tunerkit.save(toys.trained(), tmp_path)
    model = toys.net()
    parallel = ddp(model)
    put(model, path)
    model(toys.x())
    for _ in range(2):
        with pytest.raises(AdapterError, match="already inside DistributedDataParallel when adapter 'default'"):
            parallel(toys.x())
    parallel = ddp(model)
    assert torch.equal(parallel(toys.x()), model(toys.x()))


@pytest.mark.usefixtures("_process_group")
def test_an_adapter_that_ddp_knows_is_checked_once(toys: "Toys", tmp_path: Path) -> None:
    """A model wrapped before DDP passes, also next to other DDP models or after DDP is gone. No hook remains."""
    free, model = toys.net(), toys.trained()
    parallel = ddp(free)
    expected = model(toys.x())
    assert [module for module in model.modules() if has_hook(module, refuse_unsynchronised)] != []
    assert toys.close(ddp(model)(toys.x()), expected)
    assert [module for module in model.modules() if has_hook(module, refuse_unsynchronised)] == []
    del parallel
    before = toys.snapshot(free)
    tunerkit.load(free, tunerkit.save(model, tmp_path))
    assert toys.close(free(toys.x()), expected)
    assert toys.same(toys.snapshot(tunerkit.unwrap(free)), before)


@pytest.mark.usefixtures("_process_group")
def test_the_check_for_ddp_breaks_no_compiled_graph(toys: "Toys") -> None:
    """With a process group but without DDP, a compiled model stays one graph."""
    model = toys.trained(targets=["layers.*"])
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert toys.close(compiled(toys.x()), model(toys.x()))


def test_a_tied_module_cannot_be_trained_in_full(toys: "Toys") -> None:
    """A copy of a tied module would break the tie: the error names the modules that share the parameter."""
    model = toys.net()
    model.head[0].weight = nn.Parameter(torch.rand(6, 8))
    model.layers.append(nn.Linear(8, 6))
    model.layers[2].weight = model.head[0].weight
    with untouched(toys, model), pytest.raises(TargetError, match=r"layers\.2\.weight"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["conv"], "train_modules": ["head"]})


def test_a_model_that_is_itself_the_layer_is_refused_in_words(toys: "Toys") -> None:
    """A model that is a single layer has no submodule where an adapter could go."""
    for config in (None, {"targets": ["re:.*"]}, {"targets": ["*"]}, {"targets": ["weight"]}):
        model = nn.Linear(3, 3)
        with untouched(toys, model), pytest.raises(TargetError, match=r"no|nothing"):
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


def test_a_copy_of_weights_on_meta_is_refused(toys: "Toys") -> None:
    """There are no values to copy yet, so the copy would start from undefined weights."""
    model = toys.net()
    model.head.to("meta")
    with untouched(toys, model), pytest.raises(TargetError, match=r"'head\.0'.*meta"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["conv"], "train_modules": ["head"]})


def test_wrapping_while_disabled_or_merged_is_refused(toys: "Toys") -> None:
    """While a model is disabled or merged, no adapter can be added, and none is removed by mistake."""
    model = toys.trained()
    with tunerkit.disabled(model), untouched(toys, model):
        with pytest.raises(AdapterError, match="disabled"):
            tunerkit.wrap(model, "toy-shift", adapter="other")
        with pytest.raises(AdapterError, match="disabled"):
            tunerkit.unwrap(model)
    tunerkit.merge(model)
    with untouched(toys, model), pytest.raises(AdapterError, match="unmerge"):
        tunerkit.wrap(model, "toy-shift", adapter="other")


# Biases and copies


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

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = make(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            for module in self.head.values() if isinstance(self.head, nn.ModuleDict) else self.head:
                x = module(x)
            return x

    model, x = Model(), torch.rand(3, 4)
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
    with untouched(toys, model), pytest.raises(TargetError, match="parameters of its own"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["conv"], "train_modules": ["head"]})


def test_changing_statistics_of_the_base_trigger_a_warning(toys: "Toys") -> None:
    """A batch norm in the frozen base updates its statistics in training.

    One warning counts such layers, if there are any.
    """
    model = nn.Sequential(
        toys.net(batch_norm=True), toys.net(batch_norm=True), nn.BatchNorm1d(3, track_running_stats=False)
    )
    with pytest.warns(TunerkitWarning, match="^2 normalisation layers") as told:
        tunerkit.wrap(model, "toy-shift", {"targets": ["conv"]})
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_statistics_of_a_copy_trigger_no_warning(toys: "Toys", norm: nn.Module) -> None:
    """A module that this adapter or an earlier one trains in full is saved in a file, statistics included."""
    model = toys.net()
    model.batch_norm = norm
    config = {"targets": ["conv"], "train_modules": ["batch_norm"]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", TunerkitWarning)
        tunerkit.wrap(model, "toy-shift", config)
        if isinstance(norm, nn.BatchNorm2d):
            tunerkit.wrap(model, "toy-shift", {"targets": ["layers.0"]}, adapter="second")
    assert not [warning for warning in told if issubclass(warning.category, TunerkitWarning)]


def test_statistics_of_a_copy_are_trained_and_those_of_its_base_stay(toys: "Toys") -> None:
    """A batch norm trained in full updates the statistics of its copy, never those of the base, without a warning."""
    model = toys.net(batch_norm=True)
    before = toys.snapshot(model)
    config = {"targets": ["conv"], "train_modules": ["batch_norm"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", TunerkitWarning)
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


# Plugins that do not do what they promise


def plugin_of(toys: "Toys", build: Any, name: str = "toy-broken") -> object:
    """A method whose build hook is ``build(target, base)``."""
    config = type(tunerkit.structure("toy-shift", {}))

    class Broken:
        @tunerkit.hookimpl
        def tunerkit_methods(self) -> list[tunerkit.Method]:
            return [tunerkit.Method(name, config=config)]

        @tunerkit.hookimpl
        def tunerkit_build_adapter(self, target: tunerkit.Target, base: tunerkit.BaseLayer) -> Any:
            return build(target, base)

    return Broken()


@pytest.mark.parametrize("built", [None, nn.Linear(1, 1), "adapter", tunerkit.Adapter])
def test_what_is_no_adapter_is_refused_by_name(toys: "Toys", built: object) -> None:
    """The error names the method, its distribution, the target and the object that was built instead."""
    model = toys.net()
    plugin, words = (
        plugin_of(toys, lambda target, base: built),
        (r"tunerkit_build_adapter of .*'toy-broken' \(in-process\) returned (an? )?\w+ for 'layers.0'"),
    )
    with registered(plugin), untouched(toys, model), pytest.raises(PluginError, match=words):
        tunerkit.wrap(model, "toy-broken")


def test_an_adapter_that_holds_its_base_layer_is_refused(toys: "Toys") -> None:
    """As a descendant of itself, the base layer would make module walks endless and be cast to the adapter's dtype."""

    class Holder(tunerkit.Adapter):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = toys.net().double()
    plugin = plugin_of(toys, lambda target, base: Holder(target.module))
    with (
        registered(plugin),
        untouched(toys, model),
        pytest.raises(PluginError, match=r"holds the base .* for 'layers\.0'"),
    ):
        tunerkit.wrap(model, "toy-broken")


@given(fails_at=st.integers(0, 2), mask=st.integers(0, 2**6 - 1), first=st.booleans())
@settings(max_examples=15)
def test_a_build_that_fails_midway_leaves_the_model_as_it_was(
    toys: "Toys", fails_at: int, mask: int, first: bool
) -> None:
    """The plugin fails at any target, with or without another adapter in the model: nothing has changed."""
    calls: list[str] = []

    def build(target: tunerkit.Target, base: tunerkit.BaseLayer) -> tunerkit.Adapter:
        calls.append(target.path)
        if len(calls) > fails_at:
            raise ZeroDivisionError("the plugin's own")
        return tunerkit.Adapter()

    model = toys.net() if first else toys.trained(targets=["layers.0"])
    for bit, parameter in enumerate(list(model.parameters())[:6]):
        parameter.requires_grad_(bool(mask >> bit & 1))
    config = {"targets": ["conv", "layers.0", "layers.1"], "train_modules": ["head"], "bias": "all"}
    with registered(plugin_of(toys, build)), untouched(toys, model), pytest.raises(ZeroDivisionError):
        tunerkit.wrap(model, "toy-broken", config, adapter="second", seed=1)


class Unfinished(tunerkit.BaseLayer):
    """Defines none of the methods that a kind must define."""


@pytest.mark.parametrize("offered", [[3], [nn.Linear], Unfinished, 3, [Unfinished], "kinds"])
def test_a_kind_that_is_none_is_left_out_by_name(toys: "Toys", offered: Any) -> None:
    """A warning names the plugin; wrapping goes on without its answer, and `methods` lists it with the reason."""

    class Kinds:
        @tunerkit.hookimpl
        def tunerkit_base_layers(self) -> Any:
            return offered

    with registered(Kinds()):
        with pytest.warns(TunerkitWarning, match=r"plugin 'Kinds' \(in-process\)"):
            tunerkit.wrap(toys.net(), "toy-shift")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tunerkit.wrap(toys.net(), "toy-shift")
        assert "must return a list of classes" in str(tunerkit.methods()["Kinds"].error)
    assert "Kinds" not in tunerkit.methods()


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), RuntimeError("undecided"), asyncio.CancelledError()])
def test_a_kind_that_raises_when_it_is_matched_is_left_out(toys: "Toys", error: BaseException) -> None:
    """It matches the first module and raises at the second: no module becomes one of its kind; wrapping goes on."""

    class Undecided(LinearLayer):  # type: ignore[misc]  # final: no plugin should derive from it
        asked = 0

        @classmethod
        def matches(cls, module: nn.Module) -> bool:
            cls.asked += 1
            if cls.asked > 1:
                raise error
            return True

    with registered(answering("tunerkit_base_layers", [Undecided])):
        with pytest.warns(TunerkitWarning, match=r"plugin 'answering' .*Undecided.*" + type(error).__name__):
            model = tunerkit.wrap(toys.net(), "toy-shift")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tunerkit.wrap(toys.net(), "toy-shift")
        assert Undecided.asked == 2
        assert type(error).__name__ in str(tunerkit.methods()["answering"].error)
    assert tunerkit.tuner(model).ranks() == tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-shift")).ranks()


def test_good_kinds_come_after_cores_own(toys: "Toys") -> None:
    """A plugin's kinds are tried in their order after those of the core, from a list or a generator."""
    kinds = gather_knowledge().kinds

    class Kinds:
        @tunerkit.hookimpl
        def tunerkit_base_layers(self) -> Iterator[type[tunerkit.BaseLayer]]:
            yield kinds[0]

    with registered(Kinds()):
        assert gather_knowledge().kinds == (*kinds, kinds[0])
    assert gather_knowledge().kinds == kinds


WRONG = [
    ("tunerkit_weight_readers", "no list"),
    ("tunerkit_weight_readers", [("package.Owner", ("out",))]),
    ("tunerkit_weight_readers", [tunerkit.WeightReader("package.Owner", "out")]),  # type: ignore[arg-type]
    ("tunerkit_weight_readers", [tunerkit.WeightReader(nn.Linear, ("out",))]),  # type: ignore[arg-type]
    ("tunerkit_default_targets", tunerkit.DefaultTargets(("decoder",), ("out",))),
    ("tunerkit_default_targets", [tunerkit.DefaultTargets("decoder", ("out",))]),  # type: ignore[arg-type]
    ("tunerkit_default_targets", [tunerkit.DefaultTargets(("decoder",), ("*.out",))]),
]


def answering(hook: str, answer: Any) -> Any:
    """A plugin that answers one hook; if the answer is an exception, it is raised."""

    def implementation() -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    plugin = types.ModuleType("answering")
    setattr(plugin, hook, tunerkit.hookimpl(implementation))
    return plugin


@pytest.mark.parametrize(("hook", "answer"), WRONG)
def test_records_of_a_wrong_form_are_left_out_by_name(toys: "Toys", hook: str, answer: Any) -> None:
    """A warning says what was returned, what is expected and by which plugin; wrapping goes on."""
    expected = "WeightReader" if "readers" in hook else "DefaultTargets"
    with (
        registered(answering(hook, answer)),
        pytest.warns(TunerkitWarning, match=rf"{hook} of plugin 'answering' \(in-process\).*must .*{expected}") as told,
    ):
        tunerkit.wrap(toys.net(), "toy-shift")
    assert type(answer).__name__ in str(told[0].message) or repr(answer) in str(told[0].message)


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit("broken"), asyncio.CancelledError("broken")])
@pytest.mark.parametrize("hook", ["tunerkit_base_layers", "tunerkit_weight_readers", "tunerkit_default_targets"])
def test_a_plugin_that_raises_when_asked_what_it_knows_is_left_out(
    toys: "Toys", hook: str, error: BaseException
) -> None:
    """One warning names the hook and the plugin, wrapping continues without it, and `methods` lists it."""
    words = f"{type(error).__name__}: broken"
    with registered(answering(hook, error)):
        with pytest.warns(TunerkitWarning, match=f"{hook} of plugin 'answering' .*: {words}"):
            tunerkit.wrap(toys.net(), "toy-shift")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tunerkit.wrap(toys.net(), "toy-shift")
        assert tunerkit.methods()["answering"].error == f"{hook} failed and was left out: {words}"


class Reader(nn.Module):
    """Uses one child's weight and bias directly; calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.inner(x), self.out.weight, self.out.bias)


def reading() -> Any:
    """A plugin that describes `Reader`."""
    return answering("tunerkit_weight_readers", [tunerkit.WeightReader(f"{__name__}.Reader", ("out",))])


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
def test_an_adapter_at_a_child_that_its_owner_reads_trains_and_merges(
    toys: "Toys", method: str, tmp_path: Path
) -> None:
    """If a plugin names the owner, output, gradients, file and merge equal those of a model that calls the child."""
    torch.manual_seed(0)
    reader, head, x = Reader(), nn.Linear(3, 2), torch.randn(5, 3)
    net = nn.Sequential(reader, head)
    called = nn.Sequential(OrderedDict(inner=reader.inner, out=reader.out, head=head))
    calling, base = copy.deepcopy(called), copy.deepcopy(net)
    with registered(reading()), warnings.catch_warnings():
        warnings.simplefilter("error", TunerkitWarning)
        for model in (net, calling):
            toys.fill_(tunerkit.wrap(model, method, {"targets": ["out"], "bias": "adapters"}, seed=0))
            model(x).square().sum().backward()
        own, expected = (dict(next(tunerkit.tuner(model).slots())[1].named_parameters()) for model in (net, calling))
        assert own.keys() == expected.keys()
        assert all(p.grad is not None and p.grad.count_nonzero() for p in own.values())
        for name, parameter in own.items():
            torch.testing.assert_close(parameter.grad, expected[name].grad)
        output = net(x).detach()
        torch.testing.assert_close(output, calling(x).detach())
        loaded = tunerkit.load(base, tunerkit.save(net, tmp_path))
    assert torch.equal(loaded(x), output)  # who reads what was settled when the adapter went in
    torch.testing.assert_close(tunerkit.merge(net)(x), output)
    assert torch.equal(tunerkit.unmerge(net)(x), output)


def test_the_detector_names_the_owner_as_the_hook_asks_for_it(toys: "Toys") -> None:
    """The warning's advice works: after a record with the name that it gives, the adapter takes effect."""
    model = nn.Sequential(Reader())
    tunerkit.wrap(model, "toy-shift", {"targets": ["out"]})
    with pytest.warns(TunerkitWarning, match="through tunerkit_weight_readers") as caught:
        model(torch.ones(2, 3))
    named = re.search(r"names the owner \((.*)\) and", str(caught[0].message))
    assert named is not None
    plugin = answering("tunerkit_weight_readers", [tunerkit.WeightReader(named[1], ("out",))])
    tunerkit.unwrap(model)
    with registered(plugin), warnings.catch_warnings():
        warnings.simplefilter("error", TunerkitWarning)
        tunerkit.wrap(model, "toy-shift", {"targets": ["out"]})
        model(torch.ones(2, 3))


def test_a_plugin_gives_an_architecture_its_default_targets(toys: "Toys") -> None:
    """Defaults depend on the model type, and those of the core win.

    If their names match nothing, layer types decide.
    """
    plugin = answering(
        "tunerkit_default_targets",
        [tunerkit.DefaultTargets(("decoder", "bert"), ("out",)), tunerkit.DefaultTargets(("other",), ("missing",))],
    )
    chosen = {}
    for model_type in ("decoder", "bert", "other", "unknown"):
        model = nn.ModuleDict({"out": nn.Linear(3, 3), "query": nn.Linear(3, 3), "rest": nn.Linear(3, 3)})
        model.config = types.SimpleNamespace(model_type=model_type)  # type: ignore[assignment]
        with registered(plugin):
            tunerkit.wrap(model, "toy-shift")
        chosen[model_type] = [target.path for target in tunerkit.tuner(model).targets]
    everything = ["out", "query", "rest"]
    assert chosen == {"decoder": ["out"], "bert": ["query"], "other": everything, "unknown": everything}


def test_wrapping_and_loading_ask_each_module_once(toys: "Toys", tmp_path: Path) -> None:
    """The model is scanned once; copies, targets, biases and adapters all use that scan."""
    asked: list[nn.Module] = []

    class Kind(LinearLayer):  # type: ignore[misc]  # final: nobody else may derive from it
        @classmethod
        def matches(cls, module: nn.Module) -> bool:
            asked.append(module)
            return False

    class Kinds:
        @tunerkit.hookimpl
        def tunerkit_base_layers(self) -> list[type[tunerkit.BaseLayer]]:
            return [Kind]

    config = {"targets": ["layers.1"], "train_modules": ["batch_norm"], "bias": "adapters"}
    model, base = toys.net(batch_norm=True), toys.net(batch_norm=True)
    unknown = [[m for m in net.modules() if as_base_layer(m) is None] for net in (model, base)]
    with registered(Kinds()):
        tunerkit.wrap(model, "toy-shift", config)
        assert asked == unknown[0]
        path = tunerkit.save(model, tmp_path)
        asked.clear()
        tunerkit.load(base, path)
    assert asked == unknown[1]


# Copies of a wrapped model


def assert_same_but_apart(toys: "Toys", model: nn.Module, twin: nn.Module) -> None:
    """``twin`` is independent: changing either's adapters leaves the other's output, and its tuner refers to itself."""
    output = model(toys.x())
    assert torch.equal(twin(toys.x()), output)
    assert tunerkit.tuner(twin).model is twin
    assert tunerkit.tuner(model).model is model
    modules = set(twin.modules())
    assert all(target.module in modules for target in tunerkit.tuner(twin).targets)
    toys.fill_(twin, seed=1)
    moved = twin(toys.x())
    assert torch.equal(model(toys.x()), output)
    assert not torch.equal(moved, output)
    toys.fill_(model, seed=2)
    assert not torch.equal(model(toys.x()), output)
    assert torch.equal(twin(toys.x()), moved)
    with tunerkit.disabled(twin):
        assert not torch.equal(model(toys.x()), twin(toys.x()))
    tunerkit.unwrap(twin)
    assert torch.equal(twin(toys.x()), toys.net()(toys.x()))
    assert not any(".tunerkit" in name for name, _ in twin.named_modules())
    assert tunerkit.tuner(model).adapters()


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_wrapped_model_is_its_own(toys: "Toys", way: str, ran: bool) -> None:
    """deepcopy, pickle and torch.save give a model with independent adapters, before the first forward and after it."""
    model = toys.trained()
    if ran:
        model(toys.x())
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_same_but_apart(toys, model, twin)


def test_training_a_copy_leaves_the_original(toys: "Toys") -> None:
    """The copy's optimizer drives only the copy's tuner."""
    model = toys.trained()
    tunerkit.attach(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(twin, optimizer)
    losing(twin, toys.x()).backward()
    optimizer.step()
    assert (tunerkit.tuner(twin).steps, tunerkit.tuner(model).steps) == (1, 0)


def test_a_wrapped_model_follows_to_and_loads_its_own_state(toys: "Toys") -> None:
    """model.to(...) moves the adapters too.

    A state_dict loads strictly into another model that was wrapped the same way.
    """
    model = toys.trained()
    output = model(toys.x())
    other = tunerkit.wrap(toys.net(), "toy-low-rank", toys.full, seed=99)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(toys.x()), output)
    wide = model.to(torch.float64)(toys.x().double())
    assert wide.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert toys.close(wide.float(), output)


# Compiled models


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_wrapped_model_compiles_in_one_graph(toys: "Toys", backend: str) -> None:
    """Fullgraph works before any eager forward, with adapters, copies and biases; gradients are computed."""
    model = toys.trained()
    compiled: Any = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    output = compiled(toys.x())
    losing(compiled, toys.x()).backward()
    losing(model, toys.x()).backward()
    assert toys.close(output, model(toys.x()))
    for (name, found), expected in zip(compiled.named_parameters(), model.parameters(), strict=True):
        if expected.grad is not None:
            assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-5), name


def test_wrapping_disabling_and_unwrapping_take_effect_on_a_compiled_model(toys: "Toys") -> None:
    """Code compiled earlier is not reused: adding, disabling or removing an adapter takes effect at the next call."""
    # Frozen before: a change of requires_grad makes torch recompile by itself, which would hide that hooks do not.
    model, x = toys.net().requires_grad_(False), toys.x()
    compiled: Any = torch.compile(model, backend="eager")
    base = compiled(x)
    tunerkit.wrap(model, "toy-low-rank", toys.full, seed=3)
    toys.fill_(model)
    assert toys.close(compiled(x), toys.trained()(x))
    with tunerkit.disabled(model):
        assert torch.equal(compiled(x), base)
    tunerkit.merge(model)
    assert toys.close(compiled(x), toys.trained()(x))
    tunerkit.unwrap(model)
    assert torch.equal(compiled(x), base)


def test_a_compiled_model_is_wrapped_inside(toys: "Toys", tmp_path: Any) -> None:
    """Wrap accepts the object of torch.compile: paths, and so files, are those of the inner model."""
    compiled: Any = torch.compile(toys.net(), backend="eager")
    base = compiled(toys.x())
    assert tunerkit.wrap(compiled, "toy-low-rank", toys.full, seed=3) is compiled
    toys.fill_(compiled)
    output = compiled(toys.x())
    assert not torch.equal(output, base)
    assert list(tunerkit.tuner(compiled).adapters()) == ["conv", "layers.0", "layers.1"]
    loaded = tunerkit.load(toys.net(), tunerkit.save(compiled, tmp_path))
    assert toys.close(loaded(toys.x()), output)
    again = tunerkit.load(cast(nn.Module, torch.compile(toys.net(), backend="eager")), tmp_path)
    assert toys.close(again(toys.x()), output)
    assert torch.equal(tunerkit.unwrap(compiled)(toys.x()), base)


def test_a_data_parallel_model_is_wrapped_inside(toys: "Toys", tmp_path: Path) -> None:
    """Paths, files and targets are those of the bare model, also around a compiled one; tuner() finds the adapter."""
    parallel: Any = nn.DataParallel(torch.compile(toys.net(), backend="eager"))
    assert tunerkit.wrap(parallel, "toy-low-rank", toys.full, seed=3) is parallel
    toys.fill_(parallel)
    plain = toys.trained()
    assert list(tunerkit.tuner(parallel).adapters()) == list(tunerkit.tuner(plain).adapters())
    assert toys.close(parallel(toys.x()), plain(toys.x()))
    path = tunerkit.save(parallel, tmp_path)
    assert torch.equal(tunerkit.load(toys.net(), path)(toys.x()), plain(toys.x()))
    loaded = tunerkit.load(nn.DataParallel(toys.net()), path)
    assert torch.equal(loaded(toys.x()), plain(toys.x()))
    assert tunerkit.active(loaded) == ("default",)
    assert torch.equal(tunerkit.unwrap(loaded)(toys.x()), toys.net()(toys.x()))


def test_what_is_no_model_or_has_no_shape_yet_is_refused_in_words(toys: "Toys") -> None:
    """A name instead of a model, a lazy layer or a seed that is no number raises our error, and nothing is frozen."""
    with pytest.raises(tunerkit.AdapterError, match=r"expected a torch\.nn\.Module, got str"):
        tunerkit.wrap("bert", "toy-shift")  # type: ignore[type-var]
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(tunerkit.AdapterError, match="run one batch first"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["0"]})
    assert all(p.requires_grad for p in model.parameters())
    for seed in ("a", True, 2**70, -(2**64)):
        with pytest.raises(
            tunerkit.ConfigError, match=rf"expected an int of 64 bits or None, got \w+ .*{seed}.* @ seed"
        ):
            tunerkit.wrap(toys.net(), "toy-shift", seed=seed)  # type: ignore[arg-type]
    with pytest.raises(UnknownMethodError, match=r"no method named \['toy-shift'\]; installed: .*toy-shift"):
        tunerkit.wrap(toys.net(), ["toy-shift"])  # type: ignore[arg-type]


def test_a_complex_weight_is_refused(toys: "Toys") -> None:
    """Adapters are real.

    A complex layer that is named is an error; one that a broad pattern matches triggers a warning.
    """
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"0: has complex weights"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["0"]})
    with pytest.warns(TunerkitWarning, match=r"0: has complex weights"):
        tunerkit.wrap(model, "toy-shift", {"targets": "all-linear"})
    assert list(tunerkit.tuner(model).adapters()) == ["1"]


def test_a_weight_computed_from_others_is_refused(toys: "Toys") -> None:
    """Merging cannot write into a parametrized weight: the error comes at wrap, not at merge."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(tunerkit.TargetError, match="parametrization"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["0"]})


def test_attention_s_own_projection_is_not_trained_alone(toys: "Toys") -> None:
    """MultiheadAttention never calls its out_proj, so a copy of it would be saved untrained."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    with pytest.raises(tunerkit.TargetError, match="name the owner 'attention'"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["fc"], "train_modules": ["out_proj"]})


def test_a_warning_raised_as_an_error_leaves_the_model_as_it_was(toys: "Toys") -> None:
    """Wrap issues its warnings before it changes anything."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(tunerkit.TunerkitWarning):
            tunerkit.wrap(model, "toy-shift", {"targets": ["0"]})
    assert list(model.state_dict()) == list(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).state_dict())
    assert all(p.requires_grad for p in model.parameters())
