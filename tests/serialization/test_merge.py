"""Merge, unmerge and disable: outputs within the tolerance, bases bit for bit, errors that change nothing."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.interrupting import half_done
from tests.support.model_checks import each_copy, pickled, sgd, silent
from tests.support.toy_outputs import OutputPlugin
from tests.support.toys import Building, Toys
from tunerkit.errors import AdapterError, PluginError, TunerkitWarning
from tunerkit.injection import is_merged
from tunerkit.plugin import Adapter, BaseLayer, Delta
from tunerkit_testing.registering import registered

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")

CONFIGS: dict[str, dict[str, Any]] = {
    "adapters": {"targets": ["conv", "layers.0", "layers.1"]},
    "their biases": {"targets": ["conv", "layers.1"], "bias": "adapters"},
    "all": {"targets": ["conv", "layers.0"], "train_modules": ["head", "batch_norm"], "bias": "all"},
}


def trained(toys: "Toys", method: str, config: str) -> Any:
    return toys.trained(method, batch_norm=True, **CONFIGS[config])


def assert_merging_fails(toys: "Toys", model: nn.Module, error: type[Exception], words: str, **options: bool) -> None:
    """`merge` raises ``error`` with ``words``, and the model is the same before and after."""
    before = toys.snapshot(model)
    with pytest.raises(error, match=words):
        tunerkit.merge(model, **options)
    assert toys.same(toys.snapshot(model), before)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
def test_merging_keeps_the_output_and_unmerging_the_bits(toys: "Toys", method: str, config: str) -> None:
    """Merged output is equal within the tolerance, and no adapter runs; unmerge restores everything."""
    model = trained(toys, method, config)
    before, output = toys.snapshot(model), model(toys.x())
    assert not toys.close(output, toys.net(batch_norm=True)(toys.x()))
    assert tunerkit.merge(model) is model
    assert is_merged(model)
    assert toys.close(model(toys.x()), output)
    plain = toys.net(batch_norm=True)
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if ".tunerkit." not in name})
    assert torch.equal(plain(toys.x()), model(toys.x()))
    assert tunerkit.unmerge(model) is model
    after = toys.snapshot(model)
    del before["hooks"], after["hooks"], before["attributes"], after["attributes"]  # the detector's are gone by now
    assert toys.same(after, before)
    assert torch.equal(model(toys.x()), output)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_disabled_shows_the_base_bit_for_bit(toys: "Toys", config: str, merged: bool, training: bool) -> None:
    """Inside the block, also nested, the output is the base's, including its head; after it, the adapters'."""
    model = trained(toys, "toy-low-rank", config).train(training)
    base = toys.net(batch_norm=True).train(training)
    state = copy.deepcopy(model.state_dict())
    if merged:
        tunerkit.merge(model)
        state = copy.deepcopy(model.state_dict())
    output = model(toys.x())
    model.load_state_dict(state)  # training mode has moved batch norm's statistics
    with tunerkit.disabled(model):
        assert torch.equal(model(toys.x()), base(toys.x()))
        with tunerkit.disabled(model):
            assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in base.named_parameters())
        assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in base.named_parameters())
    model.load_state_dict(state)
    assert torch.equal(model(toys.x()), output)


@pytest.mark.parametrize("merged", [False, True])
def test_an_exception_inside_disabled_brings_the_adapters_back(toys: "Toys", merged: bool) -> None:
    """However the block ends, the adapters are enabled again."""
    model = trained(toys, "toy-low-rank", "all")
    if merged:
        tunerkit.merge(model)
    output = model(toys.x())
    with pytest.raises(KeyboardInterrupt), tunerkit.disabled(model), tunerkit.disabled(model):
        raise KeyboardInterrupt
    assert torch.equal(model(toys.x()), output)


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors(toys: "Toys") -> None:
    """Each error names the call to make instead; the model is unchanged."""
    model = trained(toys, "toy-low-rank", "all")
    with pytest.raises(AdapterError, match="not merged"):
        tunerkit.unmerge(model)
    tunerkit.merge(model)
    assert_merging_fails(toys, model, AdapterError, r"merged already; call tunerkit\.unmerge")


def test_inside_disabled_nothing_is_merged_or_unmerged(toys: "Toys") -> None:
    """The base's values are active there: merge would store the wrong tensors as originals."""
    model = trained(toys, "toy-low-rank", "all")
    output = model(toys.x())
    with tunerkit.disabled(model), pytest.raises(AdapterError, match="disabled"):
        tunerkit.merge(model)
    assert torch.equal(model(toys.x()), output)
    tunerkit.merge(model)
    with tunerkit.disabled(model), pytest.raises(AdapterError, match="disabled"):
        tunerkit.unmerge(model)
    assert torch.equal(tunerkit.unmerge(model)(toys.x()), output)


def test_two_adapters_merge_together(toys: "Toys") -> None:
    """The merged weights include both deltas and both biases, also at a common layer."""
    model = trained(toys, "toy-low-rank", "their biases")
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["layers.0", "layers.1"], "bias": "adapters"}, adapter="two")
    tunerkit.wrap(model, "toy-shift", {"targets": ["layers.1"]}, adapter="three")
    toys.fill_(model)
    before, output = toys.snapshot(model), model(toys.x())
    assert toys.close(tunerkit.merge(model)(toys.x()), output)
    after = toys.snapshot(tunerkit.unmerge(model))
    assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())


def test_the_merge_is_counted_in_fp32_at_least(toys: "Toys") -> None:
    """In a bf16 base the sum is rounded once: each merged weight is the nearest to the exact sum."""
    model = tunerkit.wrap(toys.net().bfloat16(), "toy-low-rank", {"targets": ["layers.1"]})
    toys.fill_(model)
    layer: Any = model.get_submodule("layers.1")
    adapter: Any = tunerkit.tuner(model).adapters()["layers.1"]
    exact = layer.weight.double() + 0.5 * adapter.b.double() @ adapter.a.double()
    tunerkit.merge(model)
    assert layer.weight.dtype == torch.bfloat16
    step = exact.abs() * 2**-8  # half of bf16's spacing, at most
    assert bool(((layer.weight.double() - exact).abs() <= step).all())


def test_a_merged_model_follows_to(toys: "Toys") -> None:
    """model.to(dtype) converts the originals too: after unmerge the base has its values in that dtype."""
    model = tunerkit.merge(trained(toys, "toy-low-rank", "all")).to(torch.bfloat16)
    base = toys.net(batch_norm=True).to(torch.bfloat16)
    with tunerkit.disabled(model):
        assert torch.equal(model(toys.x().bfloat16()), base(toys.x().bfloat16()))
    tunerkit.unwrap(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.named_parameters())


@each_copy
def test_a_copy_of_a_merged_model_unmerges_on_its_own(toys: "Toys", way: Any) -> None:
    """The copy has separate originals."""
    model = trained(toys, "toy-low-rank", "all")
    output = model(toys.x())
    tunerkit.merge(model)
    twin = way(model)
    assert torch.equal(tunerkit.unmerge(twin)(toys.x()), output)
    assert is_merged(model)
    assert not torch.equal(model.conv.weight, twin.conv.weight)


@pytest.mark.parametrize(("place", "own"), [("layers.1", "targets"), ("head", "train_modules")])
def test_what_is_tied_by_now_is_not_merged(toys: "Toys", place: str, own: str) -> None:
    """Merging would silently change a module that shares the weight: the error names it, and nothing is merged."""
    config: dict[str, Any] = {"targets": ["conv"], own: [place]}
    model = toys.trained(**config)
    layer = model.layers[1] if place == "layers.1" else model.head[2]
    model.register_module("other", nn.Linear(8, 3))
    model.other.weight = layer.weight
    path = place if place == "layers.1" else "head.2"
    for permanent in (False, True):
        with pytest.raises(AdapterError, match=rf"cannot merge into '{path}': after wrapping it was tied to other"):
            tunerkit.merge(model, permanent=permanent)
        assert not is_merged(model)
    model.other.weight = nn.Parameter(layer.weight.detach().clone())
    assert is_merged(tunerkit.merge(model))


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("inside", ["merge", "unwrap", "both"])
def test_what_is_merged_in_inference_mode_is_a_model_like_any_other(toys: "Toys", permanent: bool, inside: str) -> None:
    """Merging for evaluation leaves ordinary weights: after unwrap(keep_merged=True) the base can be trained."""
    model = toys.trained()
    output = model(toys.x())
    with torch.inference_mode(inside != "unwrap"):
        tunerkit.merge(model, permanent=permanent)
    with torch.inference_mode(inside != "merge"):
        tunerkit.unwrap(model, keep_merged=True)
    assert tunerkit.adapters(model) == {}
    assert not any(".tunerkit." in name for name, _ in model.named_parameters())
    assert toys.close(model(toys.x()), output)
    model(toys.x()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_base_built_in_inference_mode_is_unwrapped_whole(toys: "Toys", saved: Path) -> None:
    """An adapter that was loaded to predict is taken out: parameters require gradients again, as before."""
    with torch.inference_mode():
        base = toys.net()
    before = toys.snapshot(base)
    with torch.inference_mode():
        tunerkit.load(base, saved)
    assert toys.same(toys.snapshot(tunerkit.unwrap(base)), before)


@each_copy
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_made_while_disabled_is_an_enabled_model(toys: "Toys", way: Any, merged: bool) -> None:
    """There is no block around it: it acts like the model outside, and can be merged, unwrapped and trained."""
    model = toys.trained()
    output = model(toys.x())
    if merged:
        tunerkit.merge(model)
    with tunerkit.disabled(model):
        twin = way(model)
        assert torch.equal(model(toys.x()), toys.net()(toys.x()))
    assert torch.equal(twin(toys.x()), output)
    with pytest.raises(AdapterError, match="not merged"):
        tunerkit.unmerge(twin)
    assert toys.close(tunerkit.merge(twin)(toys.x()), output)
    base = toys.net().state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in tunerkit.unwrap(twin).state_dict().items())


def test_attaching_while_merged_or_disabled_is_refused(toys: "Toys") -> None:
    """Nothing in such a forward needs gradients, so training would end in an error of torch that names no cause."""
    model = trained(toys, "toy-low-rank", "all")
    optimizer = sgd(model)
    with tunerkit.disabled(model), pytest.raises(AdapterError, match=r"leave the block of tunerkit\.disabled"):
        tunerkit.attach(model, optimizer)
    tunerkit.merge(model)
    with pytest.raises(AdapterError, match=r"merged; call tunerkit\.unmerge before attaching"):
        tunerkit.attach(model, optimizer)
    tunerkit.attach(tunerkit.unmerge(model), optimizer)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_permanent_merge_keeps_no_originals_and_says_so(toys: "Toys", tmp_path: Path, config: str) -> None:
    """Functions that need the base raise an error. save works, and its file loads on the base; unwrap keeps merged."""
    model = trained(toys, "toy-low-rank", config)
    output = model(toys.x())
    unmerged_file = tunerkit.save(model, tmp_path / "before").read_bytes()
    tunerkit.merge(model, permanent=True)
    assert toys.close(model(toys.x()), output)
    assert not [name for name, _ in model.named_buffers() if "tunerkit./" in name]
    before = toys.snapshot(model)
    for refused in (tunerkit.unmerge, tunerkit.unwrap, lambda model: tunerkit.disabled(model).__enter__()):
        with pytest.raises(AdapterError, match="permanent=True, which keeps no originals"):
            refused(model)
        assert toys.same(toys.snapshot(model), before)
    with pytest.raises(AdapterError, match="merged"):
        tunerkit.merge(model)
    assert tunerkit.save(model, tmp_path / "after").read_bytes() == unmerged_file
    loaded = tunerkit.load(toys.net(batch_norm=True), tmp_path / "after")
    assert torch.equal(loaded(toys.x()), output)
    assert toys.close(tunerkit.unwrap(model, keep_merged=True)(toys.x()), output)


# Plugins that cannot say what they add


class Plain(Adapter):
    reads_output = reads_weight = False

    def forward(self, base: BaseLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y


class Broken(Building):
    """A method whose delta hook returns ``delta(adapter, base)``."""

    def __init__(self, delta: Any) -> None:
        super().__init__("toy-broken", lambda base: Plain())
        self.delta = delta

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: Adapter, base: BaseLayer) -> Any:
        return self.delta(adapter, base)


def fail_at_the_second() -> Any:
    calls: list[int] = []

    def delta(adapter: Any, base: BaseLayer) -> Delta:
        calls.append(0)
        if len(calls) % 2 == 0:
            raise ZeroDivisionError("the plugin's own")
        return Delta(weight=torch.ones(base.out_features, base.in_features))

    return delta


SHAPES = r"weight of shape \(1, 4\) for 'layers.0'.* of shape \(8, 4\)"


@pytest.mark.parametrize(
    ("plugin", "error", "words"),
    [
        (Building("toy-broken", lambda base: Plain()), AdapterError, "implements neither tunerkit_delta nor"),
        (Broken(fail_at_the_second()), ZeroDivisionError, "own"),
        (Broken(lambda a, b: Delta(weight=torch.ones(1, b.in_features))), PluginError, SHAPES),
    ],
)
def test_a_plugin_that_fails_to_merge_changes_nothing(
    toys: "Toys", plugin: object, error: type[Exception], words: str
) -> None:
    """All deltas are computed and checked before the first weight changes."""
    with registered(plugin):
        model = tunerkit.wrap(toys.net(), "toy-broken")
        for permanent in (False, True):
            assert_merging_fails(toys, model, error, words, permanent=permanent)
            assert not is_merged(model)


def test_a_bias_where_there_is_none_cannot_be_merged(toys: "Toys") -> None:
    """The base layer has no bias to store it: the error names the layer, and no weight has changed."""
    model = toys.net()
    model.layers[1] = nn.Linear(8, 8, bias=False)
    tunerkit.wrap(model, "toy-shift", {"targets": ["layers.0", "layers.1"]})
    toys.fill_(model)
    assert_merging_fails(toys, model, AdapterError, r"'layers\.1'.*the base layer has none")


def test_an_adapter_that_adds_nothing_is_merged_and_unmerged(toys: "Toys") -> None:
    """An empty delta stores no originals, and still is no permanent merge."""
    with registered(Broken(lambda adapter, base: Delta())):
        model = tunerkit.wrap(toys.net(), "toy-broken")
        output = model(toys.x())
        assert torch.equal(tunerkit.merge(model)(toys.x()), output)
        with tunerkit.disabled(model):
            assert torch.equal(model(toys.x()), output)
        assert not is_merged(tunerkit.unmerge(model))


def overflowing(toys: "Toys") -> Any:
    """A model in fp16 whose merged weights are too large at one target, and fit at the other."""
    model = toys.net().half()
    model.layers[1].weight.data.fill_(60_000)
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["layers.0", "layers.1"]})
    adapter: Any = tunerkit.tuner(model).adapters()["layers.1"]
    adapter.a.data.fill_(100)
    adapter.b.data.fill_(100)
    return model


def _keep_merged(model: nn.Module) -> nn.Module:
    return tunerkit.unwrap(model, keep_merged=True)


@pytest.mark.parametrize("value", ["overflow", torch.nan, torch.inf])
def test_weights_that_would_not_be_finite_are_not_merged(toys: "Toys", value: Any) -> None:
    """In fp16 a sum may overflow, and adapters may have NaN: the error names the targets, and nothing is changed."""
    if value == "overflow":
        model = overflowing(toys)
    else:
        model = trained(toys, "toy-low-rank", "adapters")
        adapter: Any = tunerkit.tuner(model).adapters()["layers.1"]
        adapter.b.data[0, 0] = value
    before = {name: tensor.nan_to_num(nan=-1.0) for name, tensor in model.state_dict().items()}
    words = r"1 merged tensors would contain NaN or inf: layers\.1\.weight\. Nothing was changed"
    for call in (tunerkit.merge, functools.partial(tunerkit.merge, permanent=True), _keep_merged):
        with pytest.raises(AdapterError, match=words):
            call(model)
        assert not is_merged(model)
        after = {name: tensor.nan_to_num(nan=-1.0) for name, tensor in model.state_dict().items()}
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    if value == "overflow":
        assert bool(tunerkit.merge(model.float()).layers[1].weight.isfinite().all())


def test_a_base_that_is_not_finite_itself_is_merged(toys: "Toys") -> None:
    """A module that is trained in full may hold a mask of -inf in a buffer, and a base weight may be NaN."""
    model = toys.net()
    model.head[2].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    model.layers[0].weight.data[0, 0] = torch.nan
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["layers.0"], "train_modules": ["head"]})
    assert is_merged(tunerkit.merge(toys.fill_(model)))
    assert model.head[2].mask[1] == -torch.inf


COPIES = {"itself": lambda model: model, "deep copy": copy.deepcopy, "pickle": pickled}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("made", COPIES)
def test_merged_weights_are_not_loaded_beside_the_adapters_again(
    toys: "Toys", tmp_path: Path, made: str, assign: bool
) -> None:
    """The adapters would be applied twice. Nothing has been loaded when the error comes, in whole models or parts."""
    state = copy.deepcopy(tunerkit.merge(toys.trained()).state_dict())
    model = COPIES[made](toys.trained())
    before = toys.snapshot(model)
    with pytest.raises(
        AdapterError, match=r"twice here\. Take the state_dict after tunerkit\.unmerge.*keep_merged=True"
    ):
        model.load_state_dict(state, assign=assign)
    with pytest.raises(AdapterError, match="twice"):  # a plain dict has no metadata
        nn.Sequential(model).load_state_dict({f"0.{name}": tensor.clone() for name, tensor in state.items()})
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(AdapterError, match="twice"):
        model.load_state_dict(torch.load(tmp_path / "state.pt"), assign=assign)
    with pytest.raises(AdapterError, match="twice"):
        copy.deepcopy(model).layers.load_state_dict(tunerkit.merge(toys.trained()).layers.state_dict())
    assert toys.same(toys.snapshot(model), before)


@pytest.mark.parametrize("made", COPIES)
def test_nothing_is_loaded_into_a_merged_model(toys: "Toys", made: str) -> None:
    """Unmerging would overwrite it with the originals. Afterwards the same state is loaded as always."""
    model = toys.trained()
    state, output = copy.deepcopy(model.state_dict()), model(toys.x())
    merged = COPIES[made](tunerkit.merge(model))
    other = tunerkit.merge(toys.fill_(toys.trained(), seed=8)).state_dict()
    parts = {name.removeprefix("layers."): tensor for name, tensor in state.items() if name.startswith("layers.")}
    before = toys.snapshot(merged)
    with pytest.raises(AdapterError, match="unmerging would overwrite"):
        merged.layers.load_state_dict(parts)
    assert torch.equal(merged.layers[0].weight, before["values"]["layers.0.weight"])
    for loaded in (state, copy.deepcopy(other), {name: tensor.clone() for name, tensor in other.items()}):
        with pytest.raises(AdapterError, match=r"unmerging would overwrite .*; call tunerkit\.unmerge first"):
            merged.load_state_dict(loaded)
        assert toys.same(toys.snapshot(merged), before)
    merged.load_state_dict(copy.deepcopy(merged.state_dict()))  # its own changes nothing
    tunerkit.unmerge(merged).load_state_dict(state)
    assert torch.equal(merged(toys.x()), output)


def test_states_of_one_permanent_merge_fit_another(toys: "Toys") -> None:
    """There is nothing to unmerge, so a copy in another process takes the merged weights as they are."""
    model = tunerkit.merge(toys.trained(), permanent=True)
    other = tunerkit.merge(toys.fill_(toys.trained(), seed=8), permanent=True)
    assert not torch.equal(other(toys.x()), model(toys.x()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(toys.x()), model(toys.x()))
    # In a plain dict or a safetensors file it has lost its mark. Nothing can be lost at unmerge, so it is loaded.
    for plain in (dict(model.state_dict()), {"head.2.bias": model.head[2].bias.detach().clone()}):
        with pytest.warns(TunerkitWarning, match="nothing shows whether this state_dict has merged weights"):
            other.load_state_dict(plain, strict=False)
    assert torch.equal(other(toys.x()), model(toys.x()))


def test_a_permanent_merge_beside_an_inactive_adapter_loads_its_own_state(toys: "Toys") -> None:
    """The state is marked as merged. A module that only the inactive adapter adapts is not, and refuses nothing."""
    model = tunerkit.wrap(toys.trained(targets=["layers.0"]), "toy-low-rank", {"targets": ["conv"]}, adapter="other")
    tunerkit.activate(model, "default")
    tunerkit.merge(model, permanent=True)
    output = model(toys.x())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model(toys.x()), output)


def test_the_state_inside_disabled_is_that_of_the_base(toys: "Toys") -> None:
    """It may be loaded into an unmerged model, which it gives the base's weights and the adapters."""
    model = tunerkit.merge(toys.trained())
    output = tunerkit.unmerge(copy.deepcopy(model))(toys.x())
    with tunerkit.disabled(model):
        state = copy.deepcopy(model.state_dict())
    other = tunerkit.wrap(toys.net(seed=5), "toy-low-rank", dict(toys.full))
    other.load_state_dict(state)
    assert torch.equal(other(toys.x()), output)


def test_the_state_of_another_base_is_loaded(toys: "Toys") -> None:
    """Other values of the base are no sign of a merge, with metadata and without."""
    model = toys.fill_(tunerkit.wrap(toys.net(seed=5), "toy-low-rank", dict(toys.full)), seed=6)
    for state in (model.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}):
        other = toys.trained()
        other.load_state_dict(state)
        assert torch.equal(other(toys.x()), model(toys.x()))
    with registered(OutputPlugin()):  # it has no delta that a merge could have added
        one, other = (tunerkit.wrap(nn.Sequential(nn.Linear(3, 8)), "toy-outputs", {"targets": ["0"]}) for _ in "ab")
        one.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()})
    assert torch.equal(one.state_dict()["0.weight"], other.state_dict()["0.weight"])


def test_after_unwrapping_any_state_may_be_loaded(toys: "Toys") -> None:
    """No hook stays behind; the merged weights fit the plain model."""
    state = tunerkit.unwrap(toys.trained(), keep_merged=True).state_dict()
    model = tunerkit.unwrap(toys.trained())
    assert not any(module._load_state_dict_pre_hooks or module._state_dict_hooks for module in model.modules())
    model.load_state_dict(state)


@pytest.mark.parametrize("filler", [float("inf"), float("nan"), 1e30, 0.0])
def test_a_state_is_loaded_into_weights_that_hold_nothing_yet(toys: "Toys", filler: float) -> None:
    """After ``to_empty`` they may hold anything, which is no sign of a merge."""
    source, model = toys.trained(), toys.trained()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(filler)
    model.load_state_dict({name: tensor.clone() for name, tensor in source.state_dict().items()})
    assert torch.equal(model(toys.x()), source(toys.x()))


@pytest.mark.parametrize("permanent", [False, True])
def test_an_interrupted_merge_is_undone(toys: "Toys", permanent: bool) -> None:
    """Ctrl-C at any line while weights are replaced leaves them as before, or all merged and noted as such."""
    call: Any = lambda model: tunerkit.merge(model, permanent=permanent)  # noqa: E731
    assert half_done(toys.trained, call, after="requiring_effect", points=14) == []


def test_an_interrupted_unmerge_is_completed(toys: "Toys") -> None:
    """Ctrl-C at any line of `unmerge` leaves all weights merged or none."""
    assert half_done(lambda: tunerkit.merge(toys.trained()), tunerkit.unmerge, after="unmerge", points=14) == []


@pytest.mark.parametrize("merged", [False, True])
def test_an_interrupt_leaves_no_model_disabled(toys: "Toys", merged: bool) -> None:
    """Ctrl-C at any line on the way into the block or out of it: adapters and merged weights are as before."""

    def shown(model: Any) -> None:
        with tunerkit.disabled(model):
            pass

    call: Any = (lambda: tunerkit.merge(toys.trained())) if merged else toys.trained
    assert half_done(call, shown, after="_enable_", points=30) == []


def test_unwrapping_a_merged_model_says_that_the_merge_is_undone(toys: "Toys") -> None:
    """The warning says how to keep it, and comes before anything is changed; a refused unwrap does not warn first."""
    model = tunerkit.merge(toys.trained())
    twin, merged = copy.deepcopy(model), model(toys.x())
    with silent():
        with pytest.raises(TunerkitWarning, match="undoes the merge"):
            tunerkit.unwrap(model)
        assert torch.equal(model(toys.x()), merged)
        with pytest.raises(AdapterError, match="permanent=True"):
            tunerkit.unwrap(tunerkit.merge(toys.trained(), permanent=True))
    with pytest.warns(TunerkitWarning, match=r"undoes the merge.*tunerkit.unwrap\(model, keep_merged=True\)"):
        tunerkit.unwrap(model)
    with silent():
        tunerkit.unwrap(twin, keep_merged=True)


# --- hooks of the base ---


def _doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return 2 * output


def _doubled_input(module: nn.Module, args: Any) -> Any:
    return (2 * args[0],)


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
@pytest.mark.parametrize("config", ["adapters", "all"])
@pytest.mark.parametrize("layer", ["layers.0", "head"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_of_the_base_sees_the_same_before_and_after_a_merge(
    toys: "Toys", when: str, config: str, layer: str, register: str
) -> None:
    """A hook that changes a layer's input or output acts once, on the adapted layer, whenever it was registered."""
    hook: Any = _doubled if register == "register_forward_hook" else _doubled_input
    model = toys.net(batch_norm=True)
    if when == "before wrapping":
        getattr(model.get_submodule(layer), register)(hook)
    before = model(toys.x())
    tunerkit.wrap(model, "toy-low-rank", CONFIGS[config])
    if when == "before wrapping":
        assert toys.close(model(toys.x()), before)
    else:
        getattr(model.get_submodule(layer), register)(hook)
    toys.fill_(model)
    output = model(toys.x())
    assert toys.close(tunerkit.merge(model)(toys.x()), output)
    assert toys.close(tunerkit.unmerge(model)(toys.x()), output)
    assert toys.close(tunerkit.unwrap(tunerkit.merge(model), keep_merged=True)(toys.x()), output)


def test_a_hook_that_runs_before_the_adapters_is_named_and_not_merged(toys: "Toys") -> None:
    """With prepend=True it sees the base's output, which a merged model no longer has. Nothing is changed."""
    model = toys.trained(targets=["layers.0"])
    handle = model.layers[0].register_forward_hook(_doubled, prepend=True)
    assert_merging_fails(toys, model, AdapterError, "'layers.0': its forward hook _doubled runs before the adapters")
    handle.remove()
    model.layers[1].register_forward_hook(_doubled, prepend=True)  # of a layer without adapters
    output = model(toys.x())
    assert toys.close(tunerkit.merge(model)(toys.x()), output)
