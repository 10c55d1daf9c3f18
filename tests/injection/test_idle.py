"""Adapters that nothing trained: `save` says so, and says it of no other adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.model_checks import fit, sgd, silent, told
from tests.support.toys import OneMethod, Toys
from tunerkit import hooks, serialization
from tunerkit.plugin import BaseLayer, Method
from tunerkit_testing.registering import registered
from tunerkit_testing.small import trainable
from tunerkit_testing.toy_adapters import LowRank
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin


class Started(LowRank):
    """Adds something from the start; ``zero`` is never used, so it stays 0."""

    def __init__(self, base: BaseLayer) -> None:
        super().__init__(base, 2)
        nn.init.ones_(self.b)
        self.zero = nn.Parameter(torch.zeros(2))


class StartedPlugin(OneMethod, LowRankPlugin):
    """``started``: a method whose start is not zero."""

    method = Method("started", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Started:  # type: ignore[override]
        return Started(base)


def warned(model: nn.Module, folder: Path) -> list[str]:
    """What `save` warns of; each warning names the caller's line."""
    return told(lambda: tunerkit.save(model, folder), __file__)


def fresh(toys: "Toys", method: str = "toy-low-rank", **config: object) -> Any:
    return tunerkit.wrap(toys.net(), method, config or dict(toys.full))


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_optimizer_that_was_built_before_wrap_trains_nothing_and_save_says_so(
    toys: "Toys", method: str, merged: bool, tmp_path: Path
) -> None:
    """The optimizer holds the base's parameters, which wrapping froze. One line says what to do instead."""
    model = toys.net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tunerkit.wrap(model, method, dict(toys.full))
    fit(model, optimizer, toys.x(), 2)
    if merged:
        tunerkit.merge(model)
    (text,) = warned(model, tmp_path)
    assert "'default' was saved untrained" in text
    assert "built before tunerkit.wrap" in text
    assert "\n" not in text


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift"])
def test_an_adapter_that_an_optimizer_trained_is_saved_in_silence(toys: "Toys", method: str, tmp_path: Path) -> None:
    """Without `attach` no step is counted, so its values are the only sign."""
    model = fresh(toys, method)
    fit(model, sgd(model), toys.x(), 2)
    assert tunerkit.tuner(model).steps == 0
    assert warned(model, tmp_path) == []
    tunerkit.merge(model)
    assert warned(model, tmp_path) == []


def test_one_trained_matrix_is_enough(toys: "Toys", tmp_path: Path) -> None:
    """Whoever trains the last adapter alone means to keep it; torch counts no change made through a pointer."""
    model = fresh(toys, targets=["conv", "layers.0", "layers.1"])
    parameter = model.get_parameter("layers.1.tunerkit.default.adapter.b")
    before = parameter._version
    parameter.data.view(-1)[0] = 1.0
    assert parameter._version == before
    assert warned(model, tmp_path) == []


@pytest.mark.parametrize("place", ["head.2.tunerkit.default.copy.bias", "norm.tunerkit.default.bias"])
def test_a_head_or_a_bias_that_is_trained_alone_is_told(toys: "Toys", place: str, tmp_path: Path) -> None:
    """An optimizer that holds only the new head leaves the adapter as it was, and the file looks trained."""
    model = fresh(toys, targets=["layers.0"], train_modules=["head"], bias="all")
    with torch.no_grad():
        model.get_parameter(place).add_(1)
    for merged in (False, True):
        if merged:
            tunerkit.merge(model)
        (text,) = warned(model, tmp_path)
        assert "was saved, but its matrices are untrained" in text
        assert "Check that the optimizer has these parameters" in text


def test_a_head_that_the_optimizer_lacks_is_told(toys: "Toys", tmp_path: Path) -> None:
    """The adapter is trained beside a head that stays random, and the file looks whole. Attach refuses such a one."""
    model = fresh(toys, targets=["layers.0", "layers.1"], train_modules=["head"])
    own = [p for adapter in tunerkit.tuner(model).adapters().values() for p in adapter.parameters()]
    fit(model, torch.optim.SGD(own, lr=0.1), toys.x(), 2)
    (text,) = warned(model, tmp_path)
    assert "modules trained in full have not changed: head.0, head.2" in text
    assert "the optimizer was built without these modules" in text
    fit(model, sgd(model), toys.x(), 2)
    assert warned(model, tmp_path) == []


def test_an_adapter_from_a_file_is_saved_in_silence(toys: "Toys", tmp_path: Path) -> None:
    """Even an untrained one: the file's author was warned."""
    model = fresh(toys)
    assert len(warned(model, tmp_path)) == 1
    for thawed in (False, True):
        assert warned(tunerkit.load(toys.net(), tmp_path, trainable=thawed), tmp_path) == []


@pytest.mark.parametrize("way", ["learning rate 0", "frozen by hand", "gradients cleared too early"])
def test_steps_that_train_no_matrix_are_told(toys: "Toys", way: str, tmp_path: Path) -> None:
    """They are counted, and a copy such as a new head may be trained. What the method built is as it was."""
    model = fresh(toys, targets=["layers.0", "layers.1"], train_modules=["head"])
    if way == "frozen by hand":
        for adapter in tunerkit.tuner(model).adapters().values():
            adapter.requires_grad_(False)
    rate = 0.0 if way == "learning rate 0" else 0.1
    optimizer = torch.optim.SGD(trainable(model), lr=rate)
    tunerkit.attach(model, optimizer)
    for _ in range(2):
        model(toys.x()).square().sum().backward()
        if way == "gradients cleared too early":
            for adapter in tunerkit.tuner(model).adapters().values():
                adapter.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    (text,) = warned(model, tmp_path)
    assert "saved after 2 steps, but its matrices are untrained" in text
    assert warned(tunerkit.load(toys.net(), tmp_path, trainable=True), tmp_path) == []


def test_a_checkpoint_at_step_0_is_written_in_silence(toys: "Toys", tmp_path: Path) -> None:
    """A Trainer writes one with ``save_steps`` of its own choice."""
    with silent(Warning):
        serialization.save_tuner(tunerkit.tuner(fresh(toys)), tmp_path)


def test_a_method_with_another_start_is_saved_in_silence(toys: "Toys", tmp_path: Path) -> None:
    """A parameter that is 0 throughout is only a hint: what the adapter adds decides."""
    with registered(StartedPlugin()):
        assert warned(fresh(toys, "started", targets=["layers.0"]), tmp_path) == []


def test_a_trained_adapter_costs_one_look(toys: "Toys", monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However many layers there are, the first trained one ends the search, and no delta is computed."""
    looks: list[Tensor] = []
    original = Tensor.any

    def counting(self: Tensor, *args: Any) -> Tensor:
        looks.append(self)
        return original(self, *args)

    def refused(*args: object) -> None:
        raise AssertionError(args)

    model = toys.trained()
    monkeypatch.setattr(Tensor, "any", counting)
    monkeypatch.setattr(hooks, "delta", refused)
    assert warned(model, tmp_path) == []
    assert len(looks) == len(list(model.conv.tunerkit.get("default").adapter.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["0", "1"])
def test_an_adapter_with_nan_is_not_untrained(toys: "Toys", value: float, layer: str, tmp_path: Path) -> None:
    """Wherever it is, also in a layer whose delta is not computed: 0 times NaN is NaN, so it adds something."""
    model: Any = tunerkit.wrap(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))), "toy-low-rank", {"targets": ["re:."]}
    )
    with torch.no_grad():
        model.get_submodule(layer).tunerkit.get("default").adapter.a.view(-1)[0] = value
    with silent(Warning):
        assert tunerkit.save(model, tmp_path, allow_nonfinite=True).is_file()
