"""Weights that a library holds, as a plugin says it: emptied, offloaded; and that ordinary ones never ask a plugin."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toy_readers import DirectionPlugin
from tests.support.toys import answering
from tunerkit.layers import as_base_layer, weights
from tunerkit.plugin import Holding
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net
from tunerkit_testing.toy_methods import LowRankPlugin


class Cellar:
    """A library that keeps the values of parameters elsewhere: emptied ones beside them, offloaded ones in a table."""

    def __init__(self) -> None:
        self.table: dict[nn.Module, dict[str, Tensor]] = {}

    def empty_(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.kept = parameter.data  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)

    def fill_(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data = vars(parameter).pop("kept", parameter.data)

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[Callable[[str, Tensor], Tensor]]:
        held = [parameter for parameter in module.parameters() if hasattr(parameter, "kept")]
        for parameter in held:
            parameter.data = parameter.kept
        yield lambda name, tensor: tensor
        for parameter in held:
            parameter.data = torch.empty(0)

    def offload_(self, module: nn.Module) -> None:
        self.table[module] = {name: parameter.data for name, parameter in module.named_parameters()}
        module.to("meta")

    @tunerkit.hookimpl
    def tunerkit_holdings(self) -> Sequence[Holding]:
        emptied = Holding(
            name="the cellar",
            way_out="fill it first",
            one_dtype="the cellar keeps one dtype",
            shards=lambda tensor: hasattr(tensor, "kept"),
            shape=lambda tensor: tensor.kept.shape,  # type: ignore[attr-defined]
            gathered=self.gathered,
        )
        offloaded = Holding(
            name="the cellar",
            way_out="call fetch(model)",
            offloads=lambda module: module in self.table,
            load=lambda module, name: self.table[module][name],
            device=lambda module: torch.device("cpu") if module in self.table else None,
            identity=lambda module, name, tensor: self.table[module][name].data_ptr() if module in self.table else None,
        )
        return [emptied, offloaded]


@pytest.fixture
def cellar() -> Iterator[Cellar]:
    library = Cellar()
    with registered(library, LowRankPlugin(), DirectionPlugin()):
        yield library


def test_a_forward_of_an_ordinary_model_asks_no_plugin(cellar: Cellar, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the forward of a method that reads the weight costs nothing more, and is one compiled graph."""

    def asked() -> NoReturn:
        raise AssertionError("a plugin was asked in a forward")

    model = tunerkit.wrap(net(), "toy-direction", {"targets": ["0", "2"]})
    monkeypatch.setattr(weights.plugins, "holdings", asked)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))


def test_an_emptied_base_is_adapted_as_it_is_when_whole(cellar: Cellar, tmp_path: Path) -> None:
    """Shapes, the values in the fingerprint, and copies are those of the whole weights; the base stays emptied."""
    base: Any = net()
    cellar.empty_(base)
    model = tunerkit.wrap(base, "toy-low-rank", {"targets": ["0"], "train_modules": ["2"]}, seed=0)
    assert all(parameter.numel() == 0 for parameter in base[0].parameters(recurse=False))
    plain: Any = net()[0]
    assert weights.whole_shape(base[0].weight) == plain.weight.shape
    with pytest.raises(tunerkit.errors.AdapterError, match="no fingerprint was taken before"):
        tunerkit.save(model, tmp_path)
    cellar.fill_(model)
    same = tunerkit.load(net(), tunerkit.save(model, tmp_path))
    assert torch.equal(same(X), model(X))
    assert torch.equal(tunerkit.unwrap(model)(X), net()(X))


def test_what_is_trained_beside_an_emptied_base_has_one_dtype(cellar: Cellar) -> None:
    """The library's own words are in the error."""
    base: Any = net()
    cellar.empty_(base)
    with pytest.raises(tunerkit.errors.AdapterError, match=r"bfloat16 and float32, but the cellar keeps one dtype\."):
        tunerkit.wrap(base, "toy-low-rank", {"targets": ["0"], "train_modules": ["2"], "adapter_dtype": "bfloat16"})


def test_an_offloaded_weight_is_read_loaded_and_not_merged_into(cellar: Cellar) -> None:
    """The adapter is built where the module runs; the error of a merge has the library's name and way out."""
    base: Any = net()
    cellar.offload_(base[0])
    layer = as_base_layer(base[0])
    assert layer is not None
    plain: Any = net()[0]
    assert torch.equal(layer.dense(), plain.weight.detach())
    model = tunerkit.wrap(base, "toy-low-rank", {"targets": ["0", "2"]})
    assert {parameter.device.type for parameter in tunerkit.tuner(model).parameters()} == {"cpu"}
    words = r"cannot merge into '0': the cellar offloads its weights; call fetch\(model\), which loads them"
    with pytest.raises(tunerkit.errors.AdapterError, match=words):
        tunerkit.merge(model)


def test_offloaded_weights_that_are_tied_are_seen(cellar: Cellar) -> None:
    """Offloading gives each module its own object on the meta device; the plugin says which are one weight."""
    model: Any = nn.ModuleDict({"one": nn.Linear(3, 3), "body": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    model.get_submodule("two").weight = model.get_submodule("one").weight
    for name in ("one", "two"):
        cellar.table[model[name]] = {leaf: tensor.data for leaf, tensor in model[name].named_parameters()}
    for name in ("one", "two"):
        model[name].weight = nn.Parameter(model[name].weight.to("meta"))
    with pytest.raises(tunerkit.errors.TargetError, match=r"tied weight, shared as one\.weight, two\.weight"):
        tunerkit.wrap(model, "toy-low-rank", {"targets": ["one"]})


def claiming(**fields: Any) -> Any:
    """A plugin that says of every weight what ``fields`` do."""
    return answering("tunerkit_holdings", lambda: [Holding(**fields)])


def test_a_library_that_is_not_imported_holds_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions are called once its package is imported, also after the plugins were loaded."""
    layer = nn.Linear(2, 2).to("meta")
    with registered(claiming(package="a_cellar", offloads=lambda module: True)):
        assert weights.offloading(layer) is None
        monkeypatch.setitem(sys.modules, "a_cellar", ModuleType("a_cellar"))
        assert weights.offloading(layer) is not None


def test_what_a_forward_left_whole_is_sharded_before_weights_change() -> None:
    """Law: a shard that is whole for a moment looks like a weight of this process alone, and loses what is written."""
    cut: list[nn.Module] = []
    with registered(LowRankPlugin(), claiming(reshard_=cut.append)):
        model = tunerkit.wrap(net(), "toy-low-rank", {"targets": ["0"]})
        for change in (tunerkit.merge, tunerkit.unmerge):
            cut.clear()
            change(model)
            assert cut
            assert all(each is model for each in cut)
        cut.clear()
        with tunerkit.disabled(model):
            entered = len(cut)
        assert 0 < entered < len(cut)


CLAIMS: dict[str, tuple[Any, str]] = {
    "shards": (lambda tensor: True, "adapter 'default' is sharded"),
    "lent": (lambda module: "they are lent", "cannot merge into '0': they are lent"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_who_claims_weights_is_named_where_that_stops_the_user(name: str, tmp_path: Path) -> None:
    """The message speaks of a library that is not there; a note says which plugin said so, and how to run without."""
    claim, words = CLAIMS[name]
    with registered(LowRankPlugin(), claiming(**{name: claim})):
        model = tunerkit.wrap(net(), "toy-low-rank", {"targets": ["0"]})
        with pytest.raises(tunerkit.errors.AdapterError, match=words) as caught:
            tunerkit.save(model, tmp_path) if name == "shards" else tunerkit.merge(model)
    assert caught.value.__notes__ == [
        "because of tunerkit_holdings of plugin 'answering' (in-process); to run without it, pass it to "
        "tunerkit.unregister"
    ]


def test_a_function_of_a_holding_that_is_wrong_names_the_plugin() -> None:
    """Whether it raises or answers with something else, where it is asked."""
    layer = nn.Linear(2, 2).to("meta")
    with registered(claiming(offloads=lambda module: 1 / 0)), pytest.raises(ZeroDivisionError) as raised:
        weights.offloading(layer)
    assert "raised by offloads of a Holding of plugin 'answering' (in-process); to run" in raised.value.__notes__[0]
    words = r"offloads of a Holding of plugin 'answering' .*returned 'yes'; it must return bool; to run without it"
    with registered(claiming(offloads=lambda module: "yes")), pytest.raises(tunerkit.errors.PluginError, match=words):
        weights.offloading(layer)
