"""Models whose weights accelerate's hooks load for each forward."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import attrs
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import AdapterError, StepError, TargetError
from tunerkit.layers import as_base_layer
from tunerkit.layers.weights import duplicate, execution_device
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Method, add_low_rank
from tunerkit_testing.registering import registered

if TYPE_CHECKING:
    from tests.support.toys import Toys


accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

CONFIG: dict[str, Any] = {"targets": ["conv", "layers.0", "layers.1"], "train_modules": ["head", "batch_norm"]}
PLACES = ("conv", "batch_norm", "group_norm", "layers", "norm", "head")
AWAY: dict[str, str | int] = {path: "disk" if path in ("conv", "layers", "head") else "cpu" for path in PLACES}


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    return cast(nn.Module, accelerate.cpu_offload(model, execution_device=torch.device("cpu")))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    options = {"main_device": "cpu", "offload_dir": str(folder / "weights"), "force_hooks": True}
    return cast(nn.Module, accelerate.dispatch_model(model, AWAY, **options))


def not_away(model: nn.Module, folder: Path) -> nn.Module:
    device_map = dict.fromkeys(PLACES, "cpu")
    return cast(nn.Module, accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True))


OFFLOADS = [
    pytest.param(in_memory, id="memory"),
    pytest.param(on_disk, id="disk"),
    pytest.param(not_away, id="hooks only"),
]
Offload = Callable[[nn.Module, Path], nn.Module]


def trained(toys: "Toys", model: nn.Module, method: str, *, steps: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a few steps, and the last gradients and values of trained parameters."""
    tunerkit.wrap(model, method, dict(CONFIG), seed=0)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=steps)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(model(toys.x()))
        outputs[-1].square().mean().backward()
        optimizer.step()
    return [*outputs, model(toys.x())], [tensor for p in own for tensor in (p.grad, p.detach()) if tensor is not None]


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_trains_as_the_model_itself(
    toys: "Toys", method: str, offload: Offload, tmp_path: Path
) -> None:
    """Outputs, gradients and trained values are equal; the adapter is on the device where the model runs."""
    model = offload(toys.net(batch_norm=True), tmp_path)
    away = any(p.is_meta for p in model.parameters())
    outputs, values = trained(toys, model, method)
    assert away == (offload is not not_away)
    expected_outputs, expected_values = trained(toys, toys.net(batch_norm=True), method)
    assert len(values) == len(expected_values) > 6
    for found, expected in zip([*outputs, *values], [*expected_outputs, *expected_values], strict=True):
        assert toys.close(found, expected)
    assert {p.device.type for p in tunerkit.tuner(model).parameters()} == {"cpu"}
    with tunerkit.disabled(model):
        assert torch.equal(model(toys.x()), toys.net(batch_norm=True)(toys.x()))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_adapter_goes_between_an_offloaded_model_and_the_model_itself(
    toys: "Toys", offload: Offload, tmp_path: Path
) -> None:
    """Files written on either side load on the other: without values, the fingerprint compares shapes."""
    model = offload(toys.net(batch_norm=True), tmp_path)
    trained(toys, model, "toy-low-rank")
    here = tunerkit.load(toys.net(batch_norm=True), tunerkit.save(model, tmp_path / "out"))
    assert torch.equal(here(toys.x()), model(toys.x()))
    fresh = offload(toys.net(batch_norm=True), tmp_path / "again")
    there = tunerkit.load(fresh, tunerkit.save(here, tmp_path / "here"))
    assert torch.equal(there(toys.x()), model(toys.x()))
    twin = copy.deepcopy(there)
    toys.fill_(twin)
    assert torch.equal(there(toys.x()), model(toys.x()))
    assert not torch.equal(twin(toys.x()), model(toys.x()))


@pytest.mark.parametrize("offload", [in_memory, on_disk])
def test_merging_waits_until_the_weights_are_loaded(toys: "Toys", offload: Offload, tmp_path: Path) -> None:
    """The error says what to do; once the hooks are removed, merge, unmerge and unwrap work as usual."""
    model = offload(toys.net(batch_norm=True), tmp_path)
    trained(toys, model, "toy-low-rank")
    output = model(toys.x())
    for refused in (tunerkit.merge, lambda model: tunerkit.unwrap(model, keep_merged=True)):
        with pytest.raises(AdapterError, match="remove_hook_from_submodules"):
            refused(model)
    assert torch.equal(model(toys.x()), output)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(toys.x()), output)
    assert toys.close(tunerkit.merge(model)(toys.x()), output)
    assert torch.equal(tunerkit.unmerge(model)(toys.x()), output)
    # Without its hooks a module keeps its own forward on the instance, and can be adapted again.
    base = tunerkit.unwrap(model)
    assert torch.equal(base(toys.x()), toys.net(batch_norm=True)(toys.x()))
    assert tunerkit.tuner(tunerkit.wrap(base, "toy-low-rank", CONFIG)).adapters()


def test_offloading_after_wrapping_is_refused_when_attaching(toys: "Toys", tmp_path: Path) -> None:
    """Adapters on meta would silently train nothing: the error gives the right order of calls."""
    model = in_memory(toys.trained(), tmp_path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(StepError, match="Offload first, then wrap"):
        tunerkit.attach(model, optimizer, total_steps=3)


def test_an_adapter_that_is_offloaded_itself_runs_and_is_saved_once_it_is_back(toys: "Toys", tmp_path: Path) -> None:
    """Offloading a trained model is fine for inference; it can be saved only after the hooks are removed."""
    model = in_memory(toys.trained(targets=["conv", "layers.0"], train_modules=["head"]), tmp_path)
    expected = toys.trained(targets=["conv", "layers.0"], train_modules=["head"])
    with torch.no_grad():
        assert torch.equal(model(toys.x()), expected(toys.x()))
    with pytest.raises(AdapterError, match=r"nothing to save.*remove_hook_from_submodules"):
        tunerkit.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hooks.remove_hook_from_submodules(model)
    loaded = tunerkit.load(toys.net(), tunerkit.save(model, tmp_path / "out"))
    assert torch.equal(loaded(toys.x()), model(toys.x()))


def test_a_trained_copy_does_not_carry_the_weights_of_the_model(tmp_path: Path) -> None:
    """The hook's map of all weights is not copied, and the copy stays on the device, including its ties."""
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6))})
    model.get_submodule("head.1").weight = model.get_submodule("head.2").weight
    head: Any = in_memory(model, tmp_path).get_submodule("head")
    twin: Any = duplicate(head, {})
    assert not any(p.is_meta for p in twin.parameters())
    assert twin[1].weight is twin[2].weight
    assert all(part._hf_hook.weights_map is None for part in twin)
    x = torch.randn(2, 8)
    assert torch.equal(twin(x), head(x))
    assert all(p.is_meta for p in head.parameters())
    assert head[0]._hf_hook.weights_map["weight"].data_ptr() != twin[0].weight.data_ptr()


def test_ties_are_seen_though_offloading_breaks_them(toys: "Toys", tmp_path: Path) -> None:
    """An adapter on one of two tied weights is an error that names both, also while they are offloaded."""
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 8)})
    cast(nn.Linear, model["head"]).weight = cast(nn.Embedding, model["embed"]).weight
    in_memory(model, tmp_path)
    with pytest.raises(TargetError, match=r"tied weight, shared as embed\.weight, head\.weight"):
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["embed"]})
    with pytest.raises(TargetError, match="'head' cannot be trained in full") as caught:
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["body"], "train_modules": ["head"]})
    assert str(caught.value).count("\n") == 0


def test_an_offloaded_bias_is_not_trained(toys: "Toys", tmp_path: Path) -> None:
    """Each forward would need it next to its trained copy; a bias that stays on a device is trained."""
    config = {"targets": ["layers.0"], "bias": "adapters"}
    model = in_memory(toys.net(), tmp_path)
    with pytest.raises(TargetError, match=r"bias of 'layers\.0' cannot be trained: accelerate offloads it"):
        tunerkit.wrap(model, "toy-low-rank", config)
    assert not tunerkit.tuner(tunerkit.wrap(model, "toy-low-rank", {"targets": ["layers.0"]})).biases
    here = tunerkit.wrap(not_away(toys.net(), tmp_path), "toy-low-rank", {**config, "bias": "all"})
    paths = [place.path for place in tunerkit.tuner(here).biases]
    assert paths == ["conv", "group_norm", "layers.0", "layers.1", "norm", "head.0", "head.2"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("x", [torch.randn(2, 3), torch.tensor([0, 2])], ids=["floats", "ids"])
def test_the_input_is_brought_to_the_adapter_and_the_product_to_the_output(x: Tensor, autocast: bool) -> None:
    """With several devices the hook moves the base's input but not the adapter's: the adapter does that itself."""
    seen = []

    def project_in(x: Tensor, q: Tensor, dropout: float) -> Tensor:
        seen.append(x.device.type)
        return torch.zeros(2, 2, device=q.device)

    base: Any = mock.Mock(project_in=project_in, project_out=lambda h, p: h @ p.T)
    q, p, y = torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(2, 4)
    with torch.autocast("cpu", enabled=autocast):
        there = add_low_rank(base, x, y.to("meta"), q=q.to("meta"), p=p.to("meta"), scale=1.0)
        back = add_low_rank(base, x, y.to("meta"), q=q, p=p, scale=1.0)
    assert seen == ["meta", "cpu"]
    assert there.is_meta
    assert back.is_meta


def test_the_adapter_is_built_where_the_hook_runs_the_module(toys: "Toys") -> None:
    """Between calls the weights are elsewhere; the hook's device is the module's."""
    model = toys.net()
    for layer in model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="meta", offload=True))
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["conv", "layers.0"]})
    devices = [{p.device.type for p in a.parameters()} for a in tunerkit.tuner(model).adapters().values()]
    assert devices == [{"cpu"}, {"meta"}]
    assert execution_device(model.layers[0]) == torch.device("meta")
    assert execution_device(model.conv) == torch.device("cpu")


def _own(module: nn.Linear) -> None:
    module.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight.detach()), module)  # type: ignore[method-assign]


def _foreign_hook(module: nn.Module) -> None:
    hooks.add_hook_to_module(module, hooks.ModelHook())


def _device_hook(module: nn.Module) -> None:
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"), append=True)


@pytest.mark.parametrize(
    ("changes", "adapted"),
    [
        ([_device_hook], True),
        ([_device_hook, _device_hook], True),
        ([_foreign_hook], False),
        ([_foreign_hook, _device_hook], False),
        ([_own], False),
        ([_own, _device_hook], False),
        ([_device_hook, _own], False),
    ],
)
def test_only_device_hooks_are_seen_through(changes: list[Callable[[Any], None]], adapted: bool) -> None:
    """A custom forward of the instance, below or above the hook, or a hook that may do anything: no kind."""
    layer = nn.Linear(3, 4)
    for change in changes:
        change(layer)
    assert (as_base_layer(layer) is not None) == adapted
    assert (as_base_layer(copy.deepcopy(layer)) is not None) == adapted


class Views(nn.Module):
    """A module that is trained as a copy, with buffers that are views of one storage."""

    a: Tensor
    b: Tensor
    part: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(4, 4)
        table = torch.arange(16.0).view(4, 4)
        self.register_buffer("a", table)
        self.register_buffer("b", table.T)
        self.register_buffer("part", table[:2])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.w(x) @ self.a + x @ self.b + x[..., :2] @ self.part
        return found


def test_buffers_that_share_a_storage_are_copied_each_by_itself(toys: "Toys") -> None:
    """Views at one address differ in shape and order: only parameters are tied in a copy."""
    model = nn.Sequential(nn.Linear(4, 4), Views())
    x = torch.randn(3, 4)
    expected = model(x).detach()
    accelerate = pytest.importorskip("accelerate", reason="it offloads the model")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["0"], "train_modules": ["1"]})
    torch.testing.assert_close(model(x), expected)


@attrs.frozen
class ReadsConfig(AdapterConfig):
    """Only the settings of every method."""


class Reads(Adapter):
    """Adds ``scale`` times the base layer's own product, from the weight as the base layer shows it."""

    reads_output, reads_weight = False, True

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        weight = base.matrix() if base.linear else base.dense()
        return y + self.scale * base.project_out(base.project_in(x, weight), torch.eye(base.out_features))


class ReadsPlugin:
    """``toy-reads``, a method that needs the base layer's weight in its forward."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-reads", config=ReadsConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Reads:
        return Reads(base)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_adapter_that_reads_an_offloaded_weight_gets_its_values(
    toys: "Toys", tmp_path: Path, offload: Offload
) -> None:
    """On the meta device the weight has none, and a product with it is uninitialised memory."""
    config = {"targets": ["conv", "layers.0", "layers.1"]}
    with registered(ReadsPlugin()):
        plain = tunerkit.wrap(toys.net(), "toy-reads", config)
        model = tunerkit.wrap(offload(toys.net(), tmp_path), "toy-reads", config)
        for _ in range(2):
            assert torch.equal(model(toys.x()), plain(toys.x()))


def test_a_weight_that_no_hook_loads_is_not_read() -> None:
    """An unknown hook may bring it for the layer's own forward only; then the error says what to do."""
    layer = nn.Linear(3, 3)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    base = as_base_layer(layer.to("meta"))
    assert base is not None
    for read in (base.dense, base.matrix):
        with pytest.raises(AdapterError, match=r"of a Linear .* meta device, and AlignDevicesHook does not"):
            read()


def test_the_bias_of_an_offloaded_layer_is_loaded_when_an_adapter_reads_it() -> None:
    """Law: `BaseLayer.bias` returns values, as `BaseLayer.dense` does, and not a tensor on the meta device."""
    layer = nn.Linear(3, 2)
    expected = layer.bias.detach().clone()
    away = accelerate.cpu_offload(nn.Sequential(layer), execution_device=torch.device("cpu"))
    assert away[0].bias.is_meta
    base = as_base_layer(away[0])
    assert base is not None
    found = base.bias()
    assert found is not None
    assert torch.equal(found, expected)
