"""Wrapping with toy methods: what changes, what stays the same, by any name and inside compiled models."""

import copy
import re
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import torch
from torch import nn

import tunerkit
from tests.support.model_checks import losing, untouched
from tests.support.toy_formats import read, sniff, write
from tests.support.toy_norms import NormPlugin
from tests.support.toys import OneMethod, Toys
from tunerkit.errors import AdapterError, ConfigError, PluginError, TargetError, UnknownMethodError
from tunerkit.layers.adapter import resize_
from tunerkit.plugin import AdapterConfig, Format, Method, setting
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import LowRank
from tunerkit_testing.toy_methods import LowRankConfig, Shifting

BIASES = ("none", "adapters", "all")


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
        ("toy-low-rank", {"train_modules": ["head.1"]}, TargetError, "has nothing to train"),
        ("toy-low-rank", 3, ConfigError, "LowRankConfig, a mapping or None, got int"),
        ("toy-low-rank", "rank=3", ConfigError, "LowRankConfig, a mapping or None, got str"),
        ("toy-low-rank", {"targets": ["norm"]}, TargetError, "LayerNorm"),
        ("toy-shift", LowRankConfig(), ConfigError, r"'toy-shift' takes ShiftConfig.* got LowRankConfig"),
        # Another library's config most often has the same name: the module tells it apart.
        (
            "toy-low-rank",
            type("LowRankConfig", (), {"__module__": "elsewhere.config"})(),
            ConfigError,
            r"takes LowRankConfig, .* got LowRankConfig of elsewhere\.config, not of tunerkit_testing\.toy_methods",
        ),
    ],
)
def test_bad_input_is_refused_in_words(
    toys: "Toys", method: str, config: Any, error: type[Exception], words: str
) -> None:
    """An unknown method, key, target or value, or a config of the wrong class, raises one error that helps."""
    model = toys.net()
    with untouched(toys, model), pytest.raises(error, match=words):
        tunerkit.wrap(model, method, config)


@pytest.mark.parametrize(("found", "error"), [(ZeroDivisionError("lost"), ZeroDivisionError), (3, TypeError)])
def test_what_a_formats_config_raises_names_the_format(toys: "Toys", found: object, error: type[Exception]) -> None:
    """It is asked about every object that is no config of ours, so users must see whose mistake it is."""

    def config(given: object, model: nn.Module) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    class Foreign:
        @tunerkit.hookimpl
        def tunerkit_formats(self) -> list[Format]:
            return [Format("foreign", sniff=sniff, read=read, write=write, config=config)]

    with registered(Foreign()), pytest.raises(error) as raised:
        tunerkit.wrap(toys.net(), "toy-low-rank", object())
    assert raised.value.__notes__[0] == "raised by config of format 'foreign'"
    assert "because of tunerkit_formats of plugin 'Foreign' (in-process); to run without" in raised.value.__notes__[1]


def test_a_seed_repeats_the_start_and_leaves_the_global_state_alone(toys: "Toys") -> None:
    """The same seed gives the same values whatever the global random state; without one they depend on that state."""

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


@pytest.mark.parametrize(("method", "config"), [("toy-low-rank", None), ("toy-norms", {"targets": "norm"})])
def test_a_default_device_changes_nothing(
    toys: "Toys", tmp_path: Path, method: str, config: dict[str, object] | None
) -> None:
    """Adapters and copies are built on the CPU, and norms are found there, as if torch made all tensors there."""
    config = config or dict(toys.full)
    with registered(NormPlugin()):
        expected = tunerkit.wrap(toys.net(), method, config, seed=1)
        file, wrapped, loaded = tunerkit.save(expected, tmp_path), toys.net(), toys.net()
        torch.set_default_device("meta")
        try:
            tunerkit.wrap(wrapped, method, config, seed=1)
            tunerkit.load(loaded, file)
        finally:
            torch.set_default_device(None)
        for model in (wrapped, loaded):
            assert model.state_dict().keys() == expected.state_dict().keys()
            assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())
            assert torch.equal(model(toys.x()), expected(toys.x()))


@pytest.mark.parametrize("name", ["", "x" * 65, "a.b", ".", "a/b", "/", None, 3, b"x", "\ud800", "a\udfff"])
def test_illegal_names_are_refused(toys: "Toys", name: Any) -> None:
    """Names that cannot be part of a parameter's name, empty ones, and half a surrogate pair, which no file holds."""
    model = toys.net()
    words = "half of a surrogate pair" if name in ("\ud800", "a\udfff") else "1 to 64 characters"
    with untouched(toys, model), pytest.raises(AdapterError, match=words):
        tunerkit.wrap(model, "toy-shift", adapter=name)
    with untouched(toys, model), pytest.raises(AdapterError, match=words):
        tunerkit.load(model, "nowhere", adapter=name)


def test_a_taken_name_is_refused(toys: "Toys") -> None:
    """A second adapter needs a different name; the first is unaffected."""
    model = toys.trained()
    with untouched(toys, model), pytest.raises(AdapterError, match="'default' already"):
        tunerkit.wrap(model, "toy-shift")


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


def test_a_rank_that_changes_in_place_takes_effect_on_a_compiled_model(toys: "Toys") -> None:
    """Also where torch, before 2.12, skips the question about sizes from the third call on."""
    model, x = toys.trained(), toys.x()
    compiled: Any = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        compiled(x)
    with torch.no_grad():
        for adapter in tunerkit.tuner(model).adapters().values():
            if isinstance(adapter, LowRank):
                resize_(adapter.a, adapter.a[:1])
                resize_(adapter.b, adapter.b[:, :1])
    assert toys.close(compiled(x), model(x))


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


def test_a_warning_about_what_is_left_out_points_to_the_call(toys: "Toys") -> None:
    """A reader of the log finds the line to change."""
    with pytest.warns(tunerkit.TunerkitWarning, match="left out") as caught:
        tunerkit.wrap(nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 2)), "toy-low-rank", {"targets": ["*"]})
    assert [warning.filename for warning in caught] == [__file__]


def test_a_config_sees_the_model_once_and_its_file_has_what_it_chose(toys: "Toys", tmp_path: Path) -> None:
    """``for_model`` makes defaults of the model; what is loaded takes the file's, whatever the base says then."""

    @attrs.frozen
    class Sized(AdapterConfig):
        size: int | None = setting(None, doc="A number that the model has.")

        def for_model(self, model: Any) -> Any:
            return attrs.evolve(self, size=model.size)

    class Plugin(OneMethod, Shifting):
        method = Method("toy-sized", config=Sized)

    first, second = toys.net(), toys.net()
    first.size, second.size = 3, 4
    with registered(Plugin()):
        wrapped = tunerkit.wrap(first, "toy-sized", Sized(targets=("layers.0",)))
        loaded = tunerkit.load(second, tunerkit.save(wrapped, tmp_path))
        configs: list[Any] = [tunerkit.tuner(model).config for model in (wrapped, loaded)]
    assert [config.size for config in configs] == [3, 3]


def test_a_config_that_is_wrong_about_a_model_names_the_plugin(toys: "Toys") -> None:
    """Both if ``for_model`` returns something else and if it raises, as with hooks; the model stays as it was."""

    @attrs.frozen
    class Wrong(AdapterConfig):
        answer: bool = setting(True, doc="Whether it answers.")

        def for_model(self, model: Any) -> Any:
            return None if self.answer else model.absent

    class Plugin(OneMethod, Shifting):
        method = Method("toy-wrong", config=Wrong)

    model, who = toys.net(), r"for_model of the plugin of method 'toy-wrong' \(.*\)"
    with registered(Plugin()):
        with pytest.raises(PluginError, match=f"{who} returned None for 'Net'; it must return .*Wrong"):
            tunerkit.wrap(model, "toy-wrong")
        with pytest.raises(AttributeError, match="absent") as caught:
            tunerkit.wrap(model, "toy-wrong", {"answer": False})
    assert re.search(f"raised by {who}", caught.value.__notes__[0])
    assert torch.equal(model(toys.x()), toys.net()(toys.x()))
