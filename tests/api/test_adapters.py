"""Several adapters in one model: any number, any name, together or alone, each trained by its own steps."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import tunerkit
from tests.support.lengths import is_long
from tests.support.model_checks import each_copy, fit, pickled
from tests.support.noting import NotingPlugin, hooks_of, per_step
from tests.support.toys import Building, Toys, registering
from tunerkit.errors import AdapterError, StepError
from tunerkit.injection import slots_of
from tunerkit.injection.slots import apply_slots
from tunerkit.plugin import Adapter, BaseLayer, Tuner
from tunerkit.steps import detach, drive
from tunerkit_testing.small import trainable

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")
LAYERS = {"targets": ["layers.0", "layers.1"]}
WITH_HEAD = {**LAYERS, "train_modules": ["head"]}


class Scaling(Adapter):
    """Multiplies the output so far by 1 + v: the order in which it stands beside others can be seen."""

    reads_output = False  # so it is not given the base layer's own output
    reads_weight = False

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + self.v)


_plugins = registering(Building("toy-scaling", Scaling), NotingPlugin())


def moved(model: nn.Module, name: str, *, seed: int) -> None:
    """Stand in for training of one adapter: random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tunerkit.tuner(model, name).parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p.dtype))


def several(toys: "Toys", configs: Mapping[str, Any], model: Any = None, *, batch_norm: bool = False) -> Any:
    """`net` with an adapter per entry, each moved and none active."""
    model = toys.net(batch_norm=batch_norm) if model is None else model
    for seed, (name, config) in enumerate(configs.items()):
        tunerkit.wrap(model, "toy-low-rank", config, adapter=name, seed=seed)
        moved(model, name, seed=seed)
        tunerkit.activate(model, [])
    return model


def two(toys: "Toys") -> Any:
    """Adapters "a" and "b" at the same layers, both active."""
    model = several(toys, {"a": LAYERS, "b": LAYERS})
    tunerkit.activate(model, ["a", "b"])
    return model


def alone(toys: "Toys", model: nn.Module, name: str, folder: Path) -> Tensor:
    """The output of one adapter in a separate base: the oracle."""
    tuner = tunerkit.tuner(model, name)
    fresh = toys.net(batch_norm=isinstance(model.get_submodule("batch_norm"), _BatchNorm))
    output: Tensor = tunerkit.load(fresh, tunerkit.save(model, folder / str(tuner.steps), adapter=name))(toys.x())
    return output


def trained_by(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [p for p in tunerkit.tuner(model, name).parameters() if p.requires_grad]


def values(model: nn.Module, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in tunerkit.tuner(model, name).parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Which there are, and which are active


def test_adapters_are_listed_in_the_order_they_came(toys: "Toys") -> None:
    """Names and tuners, the oldest first; callers may change the returned dict."""
    model = several(toys, {"z": LAYERS, "a": LAYERS, "m": LAYERS})
    found = tunerkit.adapters(model)
    assert list(found) == ["z", "a", "m"]
    assert all(found[name] is tunerkit.tuner(model, name) for name in found)
    found.clear()
    assert list(tunerkit.adapters(model)) == ["z", "a", "m"]
    assert list(tunerkit.adapters(torch.compile(model, backend="eager"))) == ["z", "a", "m"]  # type: ignore[arg-type]


def test_adapters_are_applied_in_the_order_given(toys: "Toys") -> None:
    """(y · s) + v is not (y + v) · s: the output follows the order of activation, not the order of adding."""
    model = toys.net()
    for name, method in (("scale", "toy-scaling"), ("shift", "toy-shift")):
        tunerkit.wrap(model, method, {"targets": ["head.2"]}, adapter=name)
        for parameter in tunerkit.tuner(model, name).parameters():
            parameter.data.fill_(0.5)
    base = toys.net()(toys.x())
    tunerkit.activate(model, ["scale", "shift"])
    assert torch.equal(model(toys.x()), base * 1.5 + 0.5)
    tunerkit.activate(model, ["shift", "scale"])
    assert torch.equal(model(toys.x()), (base + 0.5) * 1.5)


def test_a_compiled_model_follows(toys: "Toys") -> None:
    """Activate, rename, delete, freeze and unfreeze take effect in code compiled earlier, for gradients too."""
    model, x = two(toys), toys.x()
    compiled: Any = torch.compile(model, backend="eager")
    changes: list[Callable[[], None]] = [
        lambda: None,
        lambda: tunerkit.activate(model, "a"),
        lambda: tunerkit.activate(model, []),
        lambda: tunerkit.activate(model, ["b", "a"]),
        lambda: tunerkit.freeze(model, "a"),
        lambda: tunerkit.thaw(model, "a"),
        lambda: tunerkit.rename(model, "a", "new"),
        lambda: tunerkit.activate(model, "new"),
        lambda: tunerkit.delete(model, "new"),
        lambda: tunerkit.activate(model, "b"),
    ]
    for change in changes:
        change()
        found = compiled(x)
        assert torch.equal(found, model(x))
        grads = []
        for output in (found, model(x)):
            model.zero_grad()
            if output.requires_grad:
                output.sum().backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        assert all(torch.allclose(grads[0][name], grads[1][name]) for name in grads[0])


# Refusals


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("frist", "no adapter named 'frist'; there are: first, second; did you mean 'first'"),
        (["first", "secnd"], "did you mean 'second'"),
        (["first", "second", "first"], "'first' is named twice"),
        (None, "expected a name or a list of names in order, got NoneType"),
        ({"first"}, "expected a name or a list of names in order, got set"),
        (3, "got int 3"),
        ([None], "expected an adapter's name, got NoneType"),
        ([["first"]], "expected an adapter's name, got list"),
        ("", "no adapter named ''"),
    ],
)
def test_what_cannot_be_activated_is_refused_in_words(toys: "Toys", names: Any, words: str) -> None:
    """Unknown names (with the closest ones), repeated names and values that are no names; nothing changes."""
    model = several(toys, {"first": LAYERS, "second": LAYERS})
    tunerkit.activate(model, "second")
    before = model(toys.x())
    with pytest.raises(AdapterError, match=words):
        tunerkit.activate(model, names)
    assert tunerkit.active(model) == ("second",)
    assert torch.equal(model(toys.x()), before)


CHANGES: dict[str, Callable[[nn.Module, Any], None]] = {
    "freeze": tunerkit.freeze,
    "thaw": tunerkit.thaw,
    "delete": tunerkit.delete,
    "rename": lambda model, name: tunerkit.rename(model, name, "new"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("name", ["frist", None, 3])
def test_an_unknown_adapter_is_refused_by_its_name(toys: "Toys", change: Any, name: Any) -> None:
    """Functions that change an adapter require its name, even if the model has only one."""
    model = several(toys, {"first": LAYERS})
    before = toys.snapshot(model)
    with pytest.raises(AdapterError, match="did you mean 'first'" if name == "frist" else "expected an adapter's name"):
        change(model, name)
    assert toys.same(toys.snapshot(model), before)


@pytest.mark.parametrize("new", ["a.b", "", "x" * 65, None, "\ud800", "b", "a"])
def test_a_new_name_is_checked_as_in_wrap(toys: "Toys", new: Any) -> None:
    """An illegal or taken name is rejected, and nothing is renamed."""
    model = two(toys)
    before = toys.snapshot(model)
    with pytest.raises(AdapterError, match="already" if new in ("a", "b") else "adapter name"):
        tunerkit.rename(model, "a", new)
    assert toys.same(toys.snapshot(model), before)


def test_merged_or_disabled_nothing_is_activated_or_deleted(toys: "Toys") -> None:
    """The errors say what to call first."""
    model = two(toys)
    for change in (tunerkit.activate, tunerkit.delete):
        with tunerkit.disabled(model), pytest.raises(AdapterError, match=r"leave the block of tunerkit\.disabled"):
            change(model, "a")
        with pytest.raises(AdapterError, match=r"merged; call tunerkit\.unmerge before"):
            change(tunerkit.merge(copy.deepcopy(model)), "a")


def test_with_none_active_there_is_nothing_to_merge(toys: "Toys") -> None:
    """A merge without changes would leave the model unmerged, so it is an error, as is unwrap(keep_merged=True)."""
    model = two(toys)
    tunerkit.activate(model, [])
    before = toys.snapshot(model)
    with pytest.raises(AdapterError, match=r"no adapter is active.*tunerkit\.activate"):
        tunerkit.merge(model)
    with pytest.raises(AdapterError, match="no adapter is active"):
        tunerkit.unwrap(model, keep_merged=True)
    assert toys.same(toys.snapshot(model), before)


# A head for each


@pytest.fixture
def heads(toys: "Toys") -> Any:
    """Adapters "a" and "b", each with a trained copy of the whole head, which includes a batch norm."""
    config = {"targets": ["layers.0"], "train_modules": ["head", "batch_norm"]}
    model = several(toys, {"a": config, "b": config}, batch_norm=True)
    return model


def test_several_adapters_train_separate_copies_of_one_module(toys: "Toys", heads: Any, tmp_path: Path) -> None:
    """Each copy is of the base's own module, without slots and hooks, and is used while its adapter is active."""
    tunerkit.wrap(heads, "toy-shift", {"targets": ["layers.1"], "train_modules": ["head"]}, adapter="fresh")
    for module in (heads.head[0], heads.head[2]):
        slots = slots_of(module)
        assert slots is not None
        assert slots.names == tuple(slots.copies) == ("a", "b", "fresh")
        for name in slots.names:
            slot: Any = slots.get(name)
            assert "tunerkit" not in slot.copy._modules
            assert not slot.copy._forward_pre_hooks
            assert apply_slots not in slot.copy._forward_hooks.values()
            assert torch.equal(slot.copy.weight, module.weight) is (name == "fresh")
    base = toys.net(batch_norm=True)(toys.x())
    assert torch.equal(heads(toys.x()), base)
    for name in ("a", "b"):
        tunerkit.activate(heads, name)
        output = heads(toys.x())
        assert torch.equal(output, alone(toys, heads, name, tmp_path / name))
        assert toys.close(tunerkit.merge(heads)(toys.x()), output)
        with tunerkit.disabled(heads):
            assert torch.equal(heads(toys.x()), base)
        assert torch.equal(tunerkit.unmerge(heads)(toys.x()), output)


def test_two_that_train_one_module_are_not_active_together(toys: "Toys", heads: Any, tmp_path: Path) -> None:
    """One copy would replace the other: activating both is an error, as is adding one while the other is active."""
    with pytest.raises(AdapterError, match=r"'b' and 'a' both train 'batch_norm' in full"):
        tunerkit.activate(heads, ["b", "a"])
    assert tunerkit.active(heads) == ()
    path = tunerkit.save(heads, tmp_path, adapter="b")
    tunerkit.activate(heads, "a")
    before = toys.snapshot(heads)
    words = r"the active adapter 'a' trains it too.*tunerkit\.activate\(model, \[\]\) first"
    with pytest.raises(AdapterError, match=words):
        tunerkit.wrap(heads, "toy-shift", {"targets": ["layers.1"], "train_modules": ["head"]}, adapter="c")
    with pytest.raises(AdapterError, match=words):
        tunerkit.load(heads, path, adapter="c")
    assert toys.same(toys.snapshot(heads), before)
    tunerkit.activate(heads, [])
    tunerkit.load(heads, path, adapter="c")
    output = heads(toys.x())
    tunerkit.activate(heads, "b")
    assert tunerkit.active(heads) == ("b",)
    assert torch.equal(heads(toys.x()), output)


def test_a_place_of_another_kind_stays_refused(toys: "Toys") -> None:
    """A copy shares its module only with other copies: not with a target, a bias, or anything above or below it."""
    model = several(toys, {"a": WITH_HEAD})
    before = toys.snapshot(model)
    for config in (
        {"targets": ["head.0"]},
        {"targets": ["layers.0"], "bias": "all"},
        {"targets": ["conv"], "train_modules": ["layers"]},
    ):
        with pytest.raises(AdapterError, match=r"'a' trains 'head\.0' in full|cannot train 'layers\.0' in full"):
            tunerkit.wrap(model, "toy-shift", config, adapter="b")
    assert toys.same(toys.snapshot(model), before)


def test_statistics_are_held_until_the_last_copy_leaves(toys: "Toys", heads: Any) -> None:
    """Training updates only the active copy's statistics; the base's are updated again when no copy is left."""
    heads.train()
    slots = slots_of(heads.batch_norm)
    assert slots is not None
    copies = {name: slot.copy for name in ("a", "b") if (slot := slots.get(name)) is not None}
    assert all(isinstance(twin, _BatchNorm) and twin.track_running_stats for twin in copies.values())
    norms = {"base": heads.batch_norm, **copies}

    def moving() -> set[str]:
        before = {name: norm.running_mean.clone() for name, norm in norms.items()}
        heads(toys.x())
        return {name for name, norm in norms.items() if not torch.equal(norm.running_mean, before[name])}

    assert moving() == set()
    tunerkit.activate(heads, "b")
    assert moving() == {"b"}
    tunerkit.delete(heads, "b")
    assert moving() == set()
    tunerkit.activate(heads, "a")
    assert moving() == {"a"}
    tunerkit.delete(heads, "a")
    assert moving() == {"base"}


# Freeze, rename, delete


def test_a_frozen_adapter_keeps_its_values_and_its_output_counts(toys: "Toys") -> None:
    """It is still applied; neither a stale gradient nor momentum changes it. Unfrozen, its training resumes."""
    model = two(toys)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    tunerkit.attach(model, optimizer)
    fit(model, optimizer, toys.x(), 2)
    model(toys.x()).sum().backward()
    output, frozen = model(toys.x()), values(model, "a")
    tunerkit.freeze(model, "a")
    assert torch.equal(model(toys.x()), output)
    assert all(p.grad is None and not p.requires_grad for p in tunerkit.tuner(model, "a").parameters())
    optimizer.step()
    fit(model, optimizer, toys.x(), 2)
    assert equal(values(model, "a"), frozen)
    assert [tuner.steps for tuner in tunerkit.adapters(model).values()] == [2, 5]
    tunerkit.thaw(model, "a")
    fit(model, optimizer, toys.x())
    assert not equal(values(model, "a"), frozen)
    assert [tuner.steps for tuner in tunerkit.adapters(model).values()] == [3, 6]


def test_thawing_spares_what_cannot_have_a_gradient(toys: "Toys") -> None:
    """Integers in a trained copy stay as they are; a loaded adapter can be unfrozen and attached."""
    model = toys.net()
    model.head[0].table = nn.Parameter(torch.arange(3), requires_grad=False)
    tunerkit.wrap(model, "toy-shift", WITH_HEAD)
    assert not model.get_parameter("head.0.tunerkit.default.copy.table").requires_grad
    tunerkit.freeze(model, "default")
    with pytest.raises(StepError, match="frozen"):
        tunerkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), adapter="default")
    tunerkit.thaw(model, "default")
    tunerkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), adapter="default")
    assert not model.get_parameter("head.0.tunerkit.default.copy.table").requires_grad
    assert model.get_parameter("head.0.tunerkit.default.copy.weight").requires_grad


def test_renaming_moves_the_name_alone(toys: "Toys", heads: Any) -> None:
    """Parameters, output and order stay, and it is still attached; state_dict has the new name in the same position."""
    tunerkit.activate(heads, "a")
    tuner, output = tunerkit.tuner(heads, "a"), heads(toys.x())
    parameters, keys = list(tuner.parameters()), list(heads.state_dict())
    optimizer = torch.optim.SGD(trained_by(heads, "a"), lr=0.1)
    tunerkit.attach(heads, optimizer, adapter="a")
    tunerkit.rename(heads, "a", "forward")
    assert list(tunerkit.adapters(heads)) == ["forward", "b"]
    assert tunerkit.active(heads) == ("forward",)
    assert tunerkit.tuner(heads, "forward") is tuner
    assert tuner.name == "forward"
    assert all(p is q for p, q in zip(parameters, tuner.parameters(), strict=True))
    assert list(heads.state_dict()) == [key.replace(".tunerkit.a.", ".tunerkit.forward.") for key in keys]
    assert torch.equal(heads(toys.x()), output)
    fit(heads, optimizer, toys.x())
    assert tuner.steps == 1
    tunerkit.wrap(tunerkit.unwrap(heads), "toy-shift", LAYERS, adapter="a")
    assert tunerkit.active(heads) == ("a",)


@pytest.mark.parametrize("way", ["wrap", "load"])
def test_what_was_thawed_by_hand_stays_thawed(toys: "Toys", tmp_path: Path, way: str) -> None:
    """A second adapter leaves unfrozen weights alone, and unwrapping unfreezes what the first one froze."""
    path = tunerkit.save(toys.trained(), tmp_path)
    model = toys.net()
    model.conv.requires_grad_(False)
    tunerkit.wrap(model, "toy-shift", {"targets": ["layers.0"]}, adapter="first")
    model.norm.requires_grad_(True)
    if way == "wrap":
        tunerkit.wrap(model, "toy-shift", {"targets": ["layers.1"]})
    else:
        tunerkit.load(model, path)
    thawed = {name for name, p in model.named_parameters() if p.requires_grad and ".tunerkit." not in name}
    assert thawed == {"norm.weight", "norm.bias"}
    tunerkit.delete(model, "first")
    tunerkit.unwrap(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"conv.weight", "conv.bias"}


def test_a_deleted_adapter_is_trained_no_more(toys: "Toys") -> None:
    """Its optimizer has no hook or gradient of it, its handle reports the deletion, and the others' handles work."""
    model = two(toys)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tunerkit.attach(model, optimizer)
    fit(model, optimizer, toys.x())
    gone = tunerkit.tuner(model, "a")
    parameters = list(gone.parameters())
    model(toys.x()).sum().backward()
    tunerkit.delete(model, "a")
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    fit(model, optimizer, toys.x())
    assert equal(before, parameters)  # type: ignore[arg-type]
    assert gone.steps == 1
    assert tunerkit.tuner(model).steps == 3
    assert tunerkit.tuner(model).ranks() == {"layers.0": 2, "layers.1": 2}
    tunerkit.wrap(model, "toy-low-rank", {**LAYERS, "rank": 3}, adapter="a")
    with pytest.raises(AdapterError, match="'a' is gone from the model"):
        gone.ranks()


def test_the_others_are_still_watched_after_a_deletion(toys: "Toys") -> None:
    """An adapter that never runs triggers a warning, although another one was deleted before the first forward."""
    model = toys.net()
    model.layers[0].idle = nn.Linear(2, 2)
    for name in ("a", "b"):
        tunerkit.wrap(model, "toy-shift", {"targets": ["idle"]}, adapter=name)
    tunerkit.delete(model, "a")
    with pytest.warns(tunerkit.TunerkitWarning, match=r"never ran.*layers\.0\.idle"):
        model(toys.x())


def test_all_adapters_are_counted_and_saved_active_or_not(toys: "Toys", tmp_path: Path) -> None:
    """trainable_parameters counts all trained parameters, active or not; an inactive adapter is saved unchanged."""
    model = two(toys)
    counts = tunerkit.trainable_parameters(model)
    path = tunerkit.save(model, tmp_path / "active", adapter="a")
    tunerkit.activate(model, "b")
    assert tunerkit.trainable_parameters(model) == counts
    assert set(counts.adapters.values()) == {counts.trainable // 2}
    assert tunerkit.save(model, tmp_path / "not", adapter="a").read_bytes() == path.read_bytes()
    tunerkit.freeze(model, "a")
    assert tunerkit.trainable_parameters(model).adapters == {"a": 0, "b": counts.trainable // 2}


@each_copy
def test_a_copy_of_the_model_has_independent_adapters(toys: "Toys", way: Any) -> None:
    """Changes to the copy's adapters, or to which are active, don't affect the original."""
    model = two(toys)
    tunerkit.activate(model, ["b", "a"])
    output = model(toys.x())
    twin = way(model)
    assert tunerkit.active(twin) == ("b", "a")
    assert torch.equal(twin(toys.x()), output)
    tunerkit.rename(twin, "a", "new")
    tunerkit.delete(twin, "b")
    assert list(tunerkit.adapters(twin)) == ["new"]
    assert list(tunerkit.adapters(model)) == ["a", "b"]
    assert torch.equal(model(toys.x()), output)


# Whose step it is


def noting(toys: "Toys") -> tuple[Any, list[Tuner], torch.optim.Optimizer]:
    """Adapters "a" and "b" that record their step hooks, on one optimizer; "a" is active."""
    model = toys.net()
    for name in ("a", "b"):
        tunerkit.wrap(model, "noting", LAYERS, adapter=name)
    optimizer = torch.optim.SGD(trainable(model), lr=0.01)
    tunerkit.attach(model, optimizer)
    tunerkit.activate(model, "a")
    return model, list(tunerkit.adapters(model).values()), optimizer


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_counts_only_for_adapters_that_take_part(toys: "Toys", closure: bool) -> None:
    """For an inactive adapter without gradients no hook is called, and its count stays."""
    model, tuners, optimizer = noting(toys)

    def gradients() -> float:
        optimizer.zero_grad()
        loss = model(toys.x()).square().sum()
        loss.backward()
        return float(loss.detach())

    for name in ("a", "a", "b", "a"):
        tunerkit.activate(model, name)
        if closure:
            optimizer.step(gradients)
        else:
            gradients()
            optimizer.step()
    assert [tuner.steps for tuner in tuners] == [3, 1]
    assert [hooks_of(tuner) for tuner in tuners] == [per_step(3), per_step(1)]


def test_a_gradient_makes_an_inactive_adapter_take_part(toys: "Toys") -> None:
    """Two batches, one per adapter, accumulate gradients for one step: both adapters take part in it."""
    model, tuners, optimizer = noting(toys)
    for name in ("a", "b"):
        tunerkit.activate(model, name)
        model(toys.x()).sum().backward()
    optimizer.step()
    assert [hooks_of(tuner) for tuner in tuners] == [per_step(1), per_step(1)]


def test_an_active_adapter_takes_part_without_a_gradient(toys: "Toys") -> None:
    """A batch that skips its layers is still a training step, as for a single adapter."""
    _, tuners, optimizer = noting(toys)
    optimizer.step()
    assert [tuner.steps for tuner in tuners] == [1, 0]


def test_one_parameter_that_is_trained_is_enough(toys: "Toys") -> None:
    """An adapter is frozen only if all its parameters are, not just the first, and not if it has none."""
    model, tuners, optimizer = noting(toys)
    next(tuners[0].parameters()).requires_grad_(False)
    for adapter in tuners[1].adapters().values():
        adapter._parameters.clear()
    tunerkit.activate(model, ["a", "b"])
    optimizer.step()
    assert [tuner.steps for tuner in tuners] == [1, 1]


@pytest.mark.parametrize("out", ["frozen", "inactive"])
def test_a_clock_numbers_the_steps_that_an_adapter_takes_part_in(toys: "Toys", out: str) -> None:
    """Under a Trainer the number is its global step; a frozen or inactive adapter misses the steps in between."""
    model, tuners, _ = noting(toys)
    for tuner in tuners:
        detach(tuner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    tunerkit.activate(model, ["a", "b"])
    now = [0]
    drive(tuners, optimizer, total_steps=None, clock=lambda: now[0])
    for left_out in (False, True, False):
        now[0] += 1
        if out == "frozen":
            (tunerkit.freeze if left_out else tunerkit.thaw)(model, "a")
        else:
            tunerkit.activate(model, ["b"] if left_out else ["a", "b"])
        optimizer.step()
    assert hooks_of(tuners[0]) == [("before", 1), ("after", 1), ("before", 3), ("after", 3)]
    assert hooks_of(tuners[1]) == per_step(3)


OTHERS: dict[str, Callable[["Toys", nn.Module, torch.optim.Optimizer, int], None]] = {
    "freeze": lambda toys, model, _, step: (tunerkit.freeze if step % 2 else tunerkit.thaw)(model, "b"),
    "rename": lambda toys, model, _, step: tunerkit.rename(model, list(tunerkit.adapters(model))[-1], f"b{step}"),
    "delete": lambda toys, model, _, step: tunerkit.delete(model, "b") if step == 3 else None,
    "activate": lambda toys, model, _, step: tunerkit.activate(model, ("b", "a")[step % 2]),
    "add": lambda toys, model, optimizer, step: add(model, optimizer, f"c{step}"),
    "merge": lambda toys, model, _, step: merge_and_unmerge(model),
}


def add(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Another adapter, trained by the same optimizer for one step."""
    before = tunerkit.active(model)
    tunerkit.wrap(model, "toy-shift", LAYERS, adapter=name, seed=0)
    optimizer.add_param_group({"params": trained_by(model, name)})
    tunerkit.attach(model, optimizer, adapter=name)
    tunerkit.activate(model, name)
    fit(model, optimizer, torch.ones(1, 3, 5, 5))
    tunerkit.activate(model, before)


def merge_and_unmerge(model: nn.Module) -> None:
    tunerkit.unmerge(tunerkit.merge(model))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_done_to_one_adapter_leaves_the_others_training_alone(toys: "Toys", make: Any, change: Any) -> None:
    """The training of "a" ends bit-identically whether or not "b" is changed at every step."""
    ends = []
    for disturbed in (False, True):
        model = two(toys)
        options = {"momentum": 0.9} if make is torch.optim.SGD else {"weight_decay": 0.1}
        optimizer = make(trainable(model), lr=0.01, **options)
        tunerkit.attach(model, optimizer)
        for step in range(6):
            if disturbed:
                change(toys, model, optimizer, step)
            tunerkit.activate(model, "a")
            fit(model, optimizer, toys.x() + step)
        states = [t for p in trained_by(model, "a") for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        ends.append([*values(model, "a"), *states])
        assert tunerkit.tuner(model, "a").steps == 6
    assert equal(*ends)


# Names

TORCHS_OWN = ("keys", "forward", "type", "training", "weight", "bias", "parameters", "_modules", "_buffers", "0")
OURS = (
    *("get_classifier", "get_output_embeddings", "_tunerkit", "adapter", "copy", "tunerkit", "active", "base"),
    *("merged", "enabled", "permanent", "names", "default"),
)
NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="./"), min_size=1, max_size=64),
    st.sampled_from((*TORCHS_OWN, *OURS, "E", "model", "layers", "lin", "norm", "head", "head[0]", "0", "x" * 64)),
)


@given(name=NAMES, data=st.data())
@settings(
    max_examples=300 if is_long() else 100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_adapter_of_any_name_can_be_trained_beside_another(
    toys: "Toys", tmp_path: Path, name: str, data: st.DataObject
) -> None:
    """Every operation works with any legal name: train, save, load, merge, copy, rename, delete, unwrap and others."""
    other = data.draw(NAMES.filter(lambda drawn: drawn != name))
    model = toys.net()
    before = toys.snapshot(model)
    model = several(toys, {other: LAYERS, name: WITH_HEAD}, model)
    tunerkit.activate(model, [name, other])
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    tunerkit.attach(model, optimizer)
    fit(model, optimizer, toys.x(), 2)
    tunerkit.activate(model, name)
    output = model(toys.x())
    loaded = tunerkit.load(toys.net(), tunerkit.save(model, tmp_path, adapter=name), adapter=name)
    assert torch.equal(loaded(toys.x()), output)
    assert toys.close(tunerkit.merge(model)(toys.x()), output)
    assert torch.equal(tunerkit.unmerge(model)(toys.x()), output)
    twin = several(toys, {other: LAYERS, name: WITH_HEAD})
    twin.load_state_dict(safetensors.torch.load(safetensors.torch.save(model.state_dict())))
    tunerkit.activate(twin, name)
    assert torch.equal(twin(toys.x()), output)
    tunerkit.delete(twin, other)
    tunerkit.rename(twin, name, other)
    assert tunerkit.active(twin) == (other,)
    assert torch.equal(twin(toys.x()), output)
    for copied in (copy.deepcopy(twin), pickled(twin)):
        assert torch.equal(copied(toys.x()), output)
    assert toys.close(copied.double()(toys.x().double()).float(), output)
    assert toys.same(toys.snapshot(tunerkit.unwrap(model)), before)


def test_originals_that_cannot_be_restored_keep_their_adapters(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises what the restore raises; the model stays merged, and can be restored later."""

    def failing(model: nn.Module) -> None:
        raise RuntimeError("out of memory")

    model = tunerkit.wrap(toys.net(), "toy-shift", {"targets": ["layers.0"]})
    before = toys.snapshot(model)
    tunerkit.merge(model)
    with monkeypatch.context() as patch:
        patch.setattr(tunerkit.serialization, "restore_originals_", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            tunerkit.unwrap(model)
    assert list(tunerkit.adapters(model)) == ["default"]
    tunerkit.unmerge(model)
    assert toys.same(toys.snapshot(model), before)
