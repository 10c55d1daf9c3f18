"""What plugins know of layers and models: used where it is right, left out by name where it is not."""

import asyncio
import copy
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.model_checks import silent
from tests.support.toys import PastForward, Toys, answering
from tunerkit import injection
from tunerkit.errors import PluginError, TunerkitWarning
from tunerkit.hooks import gather_formats, gather_knowledge, registry
from tunerkit.layers import as_base_layer, weights
from tunerkit.layers.kinds import DenseLinear, LinearLayer
from tunerkit.plugin import BaseLayer, DefaultTargets, Format, Holding, WeightReader
from tunerkit.records import in_short
from tunerkit_testing.registering import registered


class Unfinished(BaseLayer):
    """Defines none of the methods that a kind must define."""


class Unmatched(DenseLinear):
    """Names no forwards, and has no `matches` of its own."""


class OneText(DenseLinear):
    """Names its forwards in a text: a comma is missing."""

    forwards = "my_library.Linear"  # type: ignore[assignment]


@pytest.mark.parametrize("offered", [[3], [nn.Linear], Unfinished, 3, [Unfinished], [Unmatched], [OneText], "kinds"])
def test_a_kind_that_is_none_is_left_out_by_name(toys: "Toys", offered: Any) -> None:
    """A warning names the plugin; wrapping goes on without its answer, and `methods` lists it with the reason."""
    with registered(answering("tunerkit_base_layers", offered)):
        with pytest.warns(TunerkitWarning, match=r"plugin 'answering' \(in-process\)"):
            tunerkit.wrap(toys.net(), "toy-shift")
        with silent(Warning):
            tunerkit.wrap(toys.net(), "toy-shift")
        assert "must return Iterable[type[tunerkit.plugin.BaseLayer]]" in str(tunerkit.methods()["answering"].error)
    assert "answering" not in tunerkit.methods()


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), RuntimeError("undecided"), asyncio.CancelledError()])
def test_a_kind_that_raises_when_it_is_matched_is_left_out(toys: "Toys", error: BaseException) -> None:
    """It matches the first module and raises at the second: no module becomes one of its kind; wrapping goes on."""

    class Undecided(LinearLayer):  # type: ignore[misc]  # final: no plugin should derive from it
        forwards = ()
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
        with silent(Warning):
            tunerkit.wrap(toys.net(), "toy-shift")
        assert Undecided.asked == 2
        assert type(error).__name__ in str(tunerkit.methods()["answering"].error)
    assert tunerkit.tuner(model).ranks() == tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-shift")).ranks()


def test_good_kinds_come_after_cores_own(toys: "Toys") -> None:
    """A plugin's kinds are tried in their order after those of the core, from a list or a generator."""
    kinds = gather_knowledge().kinds
    with registered(answering("tunerkit_base_layers", lambda: iter(kinds[:1]))):
        assert gather_knowledge().kinds == (*kinds, kinds[0])
    assert gather_knowledge().kinds == kinds


Reader: Any = WeightReader  # Any: what the records hold here is wrong on purpose
Written: Any = Format
Held: Any = Holding
# By hooks: answers of a wrong form, and answers whose record cannot be made; with what must be or is expected.
WRONG: list[tuple[str, Any, str]] = [
    ("tunerkit_weight_readers", "no list", "must return .*WeightReader"),
    ("tunerkit_weight_readers", [("package.Owner", ("out",))], "must return .*WeightReader"),
    ("tunerkit_weight_readers", lambda: [Reader("a.B", "out")], "children of a WeightReader is 'out'; expected tup"),
    ("tunerkit_default_targets", DefaultTargets(("decoder",), ("out",)), "must return .*DefaultTargets"),
    ("tunerkit_model_libraries", [1], r"must return .*tunerkit\.plugin\.ModelLibrary"),
    ("tunerkit_formats", "toy", "must return .*Format"),
    ("tunerkit_formats", [("toy", len)], r"at \[0\]; it must return .*Format"),
    ("tunerkit_formats", lambda: [Written("toy", len, None, len)], "read of format 'toy' is None; expected Callable"),
    ("tunerkit_holdings", "a holding", r"must return Iterable\[tunerkit\.plugin\.Holding\]"),
    ("tunerkit_holdings", lambda: [Held(load=None)], "load of holding 'an engine' is None; expected Callable"),
]
# What asks a hook, where wrapping does not; it goes on.
ASKING: dict[str, Callable[[], bool]] = {
    "tunerkit_formats": lambda: "toy" not in gather_formats(),
    "tunerkit_holdings": lambda: weights.offloading(nn.Linear(2, 2).to("meta")) is None,
}


@pytest.mark.parametrize(("hook", "answer", "words"), WRONG)
def test_records_of_a_wrong_form_are_left_out_by_name(toys: "Toys", hook: str, answer: Any, words: str) -> None:
    """A warning says what was returned, what is expected and by which plugin; the call that asked goes on."""
    ask = ASKING.get(hook, lambda: bool(tunerkit.wrap(toys.net(), "toy-shift")))
    words = rf"{hook} of plugin 'answering' \(in-process\).*{words}"
    with registered(answering(hook, answer)), pytest.warns(TunerkitWarning, match=words) as told:
        assert ask()
    assert isinstance(answer, types.FunctionType) or f"returned {in_short(answer)}" in str(told[0].message)


def read(error: BaseException) -> Iterator[object]:
    """A generator that raises when it is read."""
    yield from ()
    raise error


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit("broken"), asyncio.CancelledError("broken")])
@pytest.mark.parametrize("hook", ["tunerkit_base_layers", "tunerkit_weight_readers", "tunerkit_default_targets"])
def test_a_plugin_that_raises_when_asked_what_it_knows_is_left_out(
    toys: "Toys", hook: str, error: BaseException, late: bool
) -> None:
    """One warning names the hook and the plugin, wrapping continues without it, and `methods` lists it."""
    words = f"{type(error).__name__}: broken"
    with registered(answering(hook, read(error) if late else error)):
        with pytest.warns(TunerkitWarning, match=f"{hook} of plugin 'answering' .*: {words}"):
            tunerkit.wrap(toys.net(), "toy-shift")
        with silent(Warning):
            tunerkit.wrap(toys.net(), "toy-shift")
        assert tunerkit.methods()["answering"].error == f"{hook} failed and was left out: {words}"


def test_a_plugin_that_changes_weights_when_a_model_is_wrapped_is_named(toys: "Toys") -> None:
    """`unwrap` would give back another base, and say nothing."""

    class Scaling:
        @tunerkit.hookimpl
        def tunerkit_wrapped(self, model: Any) -> None:
            with torch.no_grad():
                model.head[0].weight.mul_(2)

    model = toys.net()
    words = r"tunerkit_wrapped of plugin 'Scaling' \(in-process\) changed weights.*loaded again; to run without it"
    with registered(Scaling()), pytest.raises(PluginError, match=words):
        tunerkit.wrap(model, "toy-shift")
    assert not tunerkit.adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plugin_may_add_to_a_model_when_it_is_wrapped(toys: "Toys") -> None:
    """A buffer of its own changes nothing of the base."""

    class Counting:
        @tunerkit.hookimpl
        def tunerkit_wrapped(self, model: Any) -> None:
            model.head.register_buffer("seen", torch.zeros(1), persistent=False)

    with registered(Counting()):
        assert tunerkit.adapters(tunerkit.wrap(toys.net(), "toy-shift"))


def test_plugins_may_be_listed_while_others_are_left_out() -> None:
    """What is left out is in a new catalog: who reads the one before meets no change."""
    with registered(answering("tunerkit_formats", ["no format"])):
        before = registry.loaded()
        with pytest.warns(TunerkitWarning, match="failed and was left out"):
            gather_formats()
        assert not before.left_out
        assert registry.loaded().left_out


SERVED = {
    "tunerkit_base_layers": ([type("Quantised", (DenseLinear,), {"forwards": ("acme.Linear",)})], "acme.Linear"),
    "tunerkit_weight_readers": ([WeightReader("acme.Attention", ("out",))], "acme.Attention"),
    "tunerkit_default_targets": ([DefaultTargets(("acme", "others"), ("out",))], "acme"),
}


@pytest.mark.parametrize("hook", SERVED)
def test_who_comes_second_with_what_one_can_serve_is_named_once(toys: "Toys", hook: str) -> None:
    """The first of two is used, and the user learns that there was a choice."""
    answer, name = SERVED[hook]
    words = f"{hook} of plugin 'answering' .* is not used for '{name}': plugin 'answering' .* comes first; to run"
    with registered(answering(hook, answer), answering(hook, answer)):
        with pytest.warns(TunerkitWarning, match=words):
            tunerkit.wrap(toys.net(), "toy-shift")
        with silent(Warning):
            tunerkit.wrap(toys.net(), "toy-shift")


def reading() -> Any:
    """A plugin that describes `PastForward`."""
    return answering("tunerkit_weight_readers", [WeightReader(f"{PastForward.__module__}.PastForward", ("out",))])


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
def test_an_adapter_at_a_child_that_its_owner_reads_trains_and_merges(
    toys: "Toys", method: str, tmp_path: Path
) -> None:
    """If a plugin names the owner, output, gradients, file and merge equal those of a model that calls the child."""
    torch.manual_seed(0)
    reader, head, x = PastForward(), nn.Linear(3, 2), torch.randn(5, 3)
    net = nn.Sequential(reader, head)
    called = nn.Sequential(OrderedDict(inner=reader.inner, out=reader.out, head=head))
    calling, base = copy.deepcopy(called), copy.deepcopy(net)
    with registered(reading()), silent():
        for model in (net, calling):
            toys.fill_(tunerkit.wrap(model, method, {"targets": ["out"], "bias": "adapters"}, seed=0))
            model(x).square().sum().backward()
        own, expected = (
            dict(injection.slots_in(tunerkit.tuner(model))[0][1].named_parameters()) for model in (net, calling)
        )
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
    model = nn.Sequential(PastForward())
    tunerkit.wrap(model, "toy-shift", {"targets": ["out"]})
    with pytest.warns(TunerkitWarning, match="in tunerkit_weight_readers") as caught:
        model(torch.ones(2, 3))
    named = re.search(r"lists the owner \((.*)\) and", str(caught[0].message))
    assert named is not None
    plugin = answering("tunerkit_weight_readers", [WeightReader(named[1], ("out",))])
    tunerkit.unwrap(model)
    with registered(plugin), silent():
        tunerkit.wrap(model, "toy-shift", {"targets": ["out"]})
        model(torch.ones(2, 3))


def test_a_plugin_gives_an_architecture_its_default_targets(toys: "Toys") -> None:
    """Defaults depend on the model type. If their names match nothing, layer types decide."""
    defaults = [DefaultTargets(("decoder",), ("out",)), DefaultTargets(("other",), ("missing",))]
    plugin = answering("tunerkit_default_targets", defaults)
    chosen = {}
    for model_type in ("decoder", "other", "unknown"):
        model = nn.ModuleDict({"out": nn.Linear(3, 3), "query": nn.Linear(3, 3), "rest": nn.Linear(3, 3)})
        model.config = types.SimpleNamespace(model_type=model_type)  # type: ignore[assignment]
        with registered(plugin):
            tunerkit.wrap(model, "toy-shift")
        chosen[model_type] = [target.path for target in tunerkit.tuner(model).targets]
    everything = ["out", "query", "rest"]
    assert chosen == {"decoder": ["out"], "other": everything, "unknown": everything}


def test_wrapping_and_loading_ask_each_module_once(toys: "Toys", tmp_path: Path) -> None:
    """Copies, targets, biases and adapters all use one scan; a module that is registered twice is asked once."""
    asked: list[nn.Module] = []

    class Kind(LinearLayer):  # type: ignore[misc]  # final: nobody else may derive from it
        forwards = ()

        @classmethod
        def matches(cls, module: nn.Module) -> bool:
            asked.append(module)
            return False

    config = {"targets": ["layers.1"], "train_modules": ["batch_norm"], "bias": "adapters"}
    model, base = toys.net(batch_norm=True), toys.net(batch_norm=True)
    for net in (model, base):
        net.again = net.norm
    unknown = [[m for m in net.modules() if as_base_layer(m) is None] for net in (model, base)]
    with registered(answering("tunerkit_base_layers", [Kind])):
        tunerkit.wrap(model, "toy-shift", config)
        assert asked == unknown[0]
        path = tunerkit.save(model, tmp_path)
        asked.clear()
        tunerkit.load(base, path)
    assert asked == unknown[1]
