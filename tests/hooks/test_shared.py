"""A module that all adapters of a method share: built, moved, saved, loaded and copied once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tunerkit
from tests.support.adapter_files import rewritten
from tests.support.model_checks import check_common, each_copy
from tests.support.toy_shared import Matrices, SharedPlugin, Weighting
from tests.support.toys import registering
from tunerkit.plugin import BaseLayer, Method, Target
from tunerkit_testing.checks.probing import shared_in
from tunerkit_testing.known_cases import NETWORK
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, step, train, trainable
from tunerkit_testing.toy_methods import LowRankConfig

TARGETS = {"targets": ["0", "2", "4"]}


_toys = registering(SharedPlugin())


def wrapped(adapter: str = "default", model: nn.Module | None = None, **config: Any) -> nn.Module:
    return tunerkit.wrap(model or net(), "toy-shared", {**TARGETS, **config}, adapter=adapter, seed=0)


def trained(*names: str) -> nn.Module:
    """A model with an adapter of each name (by default one), trained for three steps."""
    model = None
    for number, name in enumerate(names or ("default",)):
        model = wrapped(name, model, rank=2 + number)
    assert model is not None
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=3)
    train(model, optimizer, 3)
    return model


def shared_by(model: nn.Module, adapter: str | None = None) -> set[int]:
    return {id(each.shared) for each in tunerkit.tuner(model, adapter).adapters().values()}


def test_it_is_built_once_with_all_targets_in_sight_and_is_as_large_as_the_largest() -> None:
    """All adapters find the same module, the tuner too; the model's output does not change."""
    model = wrapped()
    shared = shared_in(tunerkit.tuner(model))
    assert isinstance(shared, Matrices)
    assert (shared.a.shape, shared.b.shape) == ((2, 8), (8, 2))
    assert shared_by(model) == {id(shared)}
    assert torch.equal(model(X), net()(X))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith((".a", ".b"))]
    assert names == [f"0.tunerkit.default.tunerkit.{name}" for name in "ab"]
    assert {"0.tunerkit.a", "0.tunerkit.b"} <= {name for name, _ in tunerkit.tuner(model).named_parameters()}
    assert not shared.a.requires_grad


def test_it_does_what_any_method_does() -> None:
    """And the kit finds the one shared module used, and unchanged by training."""
    check_common("toy-shared", NETWORK, "shared_module_kept", "shared_module_used")


def test_it_moves_and_is_cast_once_with_the_model() -> None:
    """It lies beside the first adapter: ``to`` reaches it, and all adapters see the result."""
    assert shared_in(tunerkit.tuner(wrapped(adapter_dtype="bfloat16"))).a.dtype == torch.bfloat16  # type: ignore[union-attr]
    model = trained()
    expected = model(X)
    model.double()
    (adapter, *_) = tunerkit.tuner(model).adapters().values()
    assert isinstance(adapter, Weighting)
    assert adapter.shared.get_parameter("a").dtype == torch.float64
    torch.testing.assert_close(model(X.double()), expected.double(), rtol=1e-5, atol=1e-6)
    model.to("meta")
    assert adapter.shared.get_parameter("a").is_meta


def test_it_is_saved_once_and_loaded_once(tmp_path: Path) -> None:
    """The file has one copy however many targets there are; loading draws nothing of it anew."""
    model = trained()
    path = tunerkit.save(model, tmp_path)
    with safe_open(path, "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 -- not a dict
    assert {name: sizes[name] for name in ("0.tunerkit.a", "0.tunerkit.b")} == {"0.tunerkit.a": 16, "0.tunerkit.b": 16}
    assert len(sizes) == 2 + 2 * 3
    torch.manual_seed(11)
    loaded = tunerkit.load(net(), path)
    assert torch.equal(loaded(X), model(X))
    assert len(shared_by(loaded)) == 1
    again = tunerkit.load(net(), tunerkit.save(loaded, tmp_path / "again"), trainable=True)
    assert torch.equal(again(X), model(X))
    assert {name.rpartition(".")[2] for name, p in again.named_parameters() if p.requires_grad} == {"v", "d"}


@each_copy
def test_a_copy_of_the_model_has_one_of_its_own(way: Any) -> None:
    """All adapters of the copy share the copy's module, and changing it does not reach the original."""
    model = trained()
    before = model(X)
    twin = way(model)
    shared = shared_in(tunerkit.tuner(twin))
    assert shared is not None
    assert shared_by(twin) == {id(shared)} != shared_by(model)
    assert torch.equal(twin(X), before)
    with torch.no_grad():
        shared.get_parameter("a").add_(1.0)
    assert not torch.equal(twin(X), before)
    assert torch.equal(model(X), before)


def test_two_adapters_of_the_method_have_one_each(tmp_path: Path) -> None:
    """They are saved, renamed and deleted apart from each other."""
    model = trained("one", "two")
    assert shared_by(model, "one").isdisjoint(shared_by(model, "two"))
    assert (len(shared_by(model, "one")), len(shared_by(model, "two"))) == (1, 1)
    both = model(X)
    paths = [tunerkit.save(model, tmp_path / name, adapter=name) for name in ("one", "two")]
    tunerkit.rename(model, "one", "first")
    assert torch.equal(model(X), both)
    tunerkit.activate(model, ["two"])
    alone = model(X)
    tunerkit.delete(model, "first")
    assert torch.equal(model(X), alone)
    assert shared_in(tunerkit.tuner(model)) is not None
    loaded = net()
    for path, name in zip(paths, ("one", "two"), strict=True):
        tunerkit.load(loaded, path, adapter=name)
    torch.testing.assert_close(loaded(X), both)


def test_a_reference_keeps_one_copy() -> None:
    """The frozen twin computes what the adapter did when it was taken, and has one shared module for all targets."""
    pytest.importorskip("tunerkit_transformers", reason="it makes references")
    model = trained()
    expected = model(X)
    kept = tunerkit.reference(model)
    step(model, torch.optim.SGD(trainable(model), lr=1.0))
    assert not torch.equal(model(X), expected)
    assert torch.equal(kept(X), expected)


def test_a_state_dict_carries_it() -> None:
    """``state_dict`` has it once, and another wrapped model can load it."""
    model, other = trained(), wrapped()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("name", ["0.tunerkit.a", "0.tunerkit.b"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensor: None, "missing: {name}"),
        (lambda tensor: tensor[:, :1].contiguous(), "size mismatch"),
        (lambda tensor: tensor.to(torch.int32), "{name} is int32, expected float32"),
        (lambda tensor: tensor * torch.inf, "NaN or inf"),
    ],
)
def test_a_file_whose_shared_tensors_are_damaged_is_refused(name: str, damage: Any, words: str, tmp_path: Path) -> None:
    """Like any of an adapter's tensors: by name, and nothing is loaded. The digest fits what was damaged."""
    path = tunerkit.save(trained(), tmp_path)

    def change(_: Any, tensors: dict[str, Any]) -> None:
        changed = damage(tensors.pop(name))
        tensors.update({} if changed is None else {name: changed})

    rewritten(path, path, change)
    base = net()
    with pytest.raises(tunerkit.errors.FileError, match=words.format(name=name)):
        tunerkit.load(base, path)
    assert not list(tunerkit.adapters(base))


def test_a_file_that_asks_for_huge_shared_matrices_is_refused(tmp_path: Path) -> None:
    """Before they are made: the config asks for a rank that the file's tensors do not have."""
    path = tunerkit.save(trained(), tmp_path)
    rewritten(path, path, lambda fields, tensors: fields["config"].update(rank=10**10))
    with pytest.raises(tunerkit.errors.FileError, match=r"does not fit its own header.*'0' needs a tensor of"):
        tunerkit.load(net(), path)


class Mutating(SharedPlugin):
    """Changes the shared module while it builds the adapters."""

    method = Method("toy-mutating", config=LowRankConfig)

    def __init__(self, change: Any) -> None:
        self.change = change

    @tunerkit.hookimpl
    def tunerkit_build_adapter(  # type: ignore[override]
        self, base: BaseLayer, config: LowRankConfig, shared: Matrices
    ) -> Weighting:
        adapter = Weighting(base, config.rank)
        self.change(adapter, shared)
        return adapter


@torch.no_grad()
def write(adapter: Weighting, shared: Matrices) -> None:
    shared.a.add_(1.0)


HELD = r"an adapter that holds the shared module as a child.*self\.shared"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (write, "changed the shared module"),
        (lambda _, shared: setattr(shared, "a", nn.Parameter(torch.ones_like(shared.a))), "changed the shared module"),
        (lambda _, shared: shared.register_buffer("more", torch.ones(1)), "changed the shared module"),
        (lambda own, shared: setattr(own, "own", shared), HELD),
    ],
)
def test_building_an_adapter_must_not_change_or_hold_it(change: Any, words: str) -> None:
    """The error names the method, the hook and the target; the model is as it was."""
    model = net()
    with registered(Mutating(change)), pytest.raises(tunerkit.errors.PluginError, match=words) as error:
        tunerkit.wrap(model, "toy-mutating", TARGETS)
    for part in ("toy-mutating", "tunerkit_build_adapter", "'0'"):
        assert part in str(error.value)
    assert list(model.state_dict()) == list(net().state_dict())


class Answering(SharedPlugin):
    """Answers `tunerkit_shared` with a given value."""

    method = Method("toy-answering", config=LowRankConfig)

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @tunerkit.hookimpl
    def tunerkit_shared(self, targets: Sequence[Target]) -> Any:  # type: ignore[override]
        return self.answer(targets)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda targets: torch.ones(2), r"returned a Tensor for 3 targets; it must return torch\.nn\.Module \| None"),
        (lambda targets: nn.ModuleList([targets[0].module]), "holds a base layer"),
    ],
)
def test_a_shared_module_is_a_module_of_its_own(answer: Any, words: str) -> None:
    """Anything else is named with the method and the hook."""
    with registered(Answering(answer)), pytest.raises(tunerkit.errors.PluginError, match=f"tunerkit_shared.*{words}"):
        tunerkit.wrap(net(), "toy-answering", TARGETS)


def test_a_method_may_decide_that_it_shares_nothing() -> None:
    """None is an answer; an adapter then has no ``shared``."""
    with registered(Answering(lambda targets: None)):
        model = tunerkit.wrap(net(), "toy-answering", TARGETS)
        assert shared_in(tunerkit.tuner(model)) is None
        adapter = tunerkit.tuner(model).adapters()["0"]
        assert not hasattr(adapter, "shared")
        with pytest.raises(AttributeError, match="'Weighting' object has no attribute 'shared'"):
            model(X)


class Trainable(SharedPlugin):
    """Trains the shared matrices too."""

    method = Method("toy-shared-trainable", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_shared(self, bases: Sequence[BaseLayer], config: LowRankConfig) -> Matrices:
        return Matrices(8, 8, config.rank).requires_grad_(True)


def test_shared_parameters_that_are_not_fixed_are_trained(tmp_path: Path) -> None:
    """They get the sum of the gradients at all targets, are frozen with the adapter, and are in the optimizer once."""
    with registered(Trainable()):
        model = tunerkit.wrap(net(), "toy-shared-trainable", TARGETS, seed=0)
        assert len({id(p) for p in trainable(model)}) == len(trainable(model)) == 2 + 2 * 3
        optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
        tunerkit.attach(model, optimizer, total_steps=4)
        before = shared_in(tunerkit.tuner(model))
        assert isinstance(before, Matrices)
        start = before.a.detach().clone()
        train(model, optimizer, 4)
        assert not torch.equal(before.a, start)
        loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path))
        assert torch.equal(loaded(X), model(X))
        tunerkit.freeze(model, "default")
        assert not trainable(model)
