"""Parameter groups: the learning rates and weight decays that a method asks for. Starts that are fitted to data."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.model_checks import attached, sgd, told
from tests.support.resumed_loop import assert_resumes
from tests.support.toy_plus import PlusPlugin, ids, named
from tests.support.toy_starts import FittedPlugin
from tests.support.toys import OneMethod, registering
from tunerkit.plugin import BaseLayer, Method, ParamGroup, Statistics, StatisticsRequest, Tuner, fit_start_
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, step, train, trainable
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

TARGETS = {"targets": ["0", "2"]}


_toys = registering(PlusPlugin(), LowRankPlugin(), FittedPlugin())


def wrapped(method: str = "toy-plus", **config: Any) -> nn.Module:
    return tunerkit.wrap(net(), method, {**TARGETS, **config}, seed=0)


def test_every_trained_parameter_is_in_one_group_with_what_its_method_asks_for() -> None:
    """Heads and biases have the plain settings; an optimizer takes the groups as they are."""
    model = wrapped(train_modules=["4"], bias="adapters")
    plain, fast = tunerkit.param_groups(model, lr=1e-3, weight_decay=0.1)
    assert ids(plain) | ids(fast) == {id(parameter) for parameter in trainable(model)}
    assert len(plain["params"]) + len(fast["params"]) == len(trainable(model))
    assert ids(fast) == named(model, "adapter.b")
    assert (plain["lr"], fast["lr"]) == (1e-3, 1.6e-2)
    assert (plain["weight_decay"], fast["weight_decay"]) == (0.1, 0.0)
    optimizer = torch.optim.AdamW([plain, fast])
    tunerkit.attach(model, optimizer, total_steps=3)
    losses = train(model, optimizer, 3)
    assert losses[-1] < losses[0]


def test_a_method_that_asks_for_nothing_gives_one_group() -> None:
    """Weight decay is left to the optimizer unless it is given."""
    model = wrapped("toy-low-rank")
    (group,) = tunerkit.param_groups(model, lr=0.5)
    assert set(group) == {"params", "lr"}
    assert [id(p) for p in group["params"]] == [id(p) for p in trainable(model)]


def test_several_adapters_and_frozen_ones() -> None:
    """Each method is asked about its own adapter, and what is frozen is in no group."""
    model = tunerkit.wrap(wrapped(), "toy-low-rank", TARGETS, adapter="plain")
    plain, fast = tunerkit.param_groups(model, lr=1.0)
    assert ids(fast) == named(model, "default.adapter.b")
    assert ids(plain) == named(model, "adapter.a", "plain.adapter.b")
    tunerkit.freeze(model, "default")
    (group,) = tunerkit.param_groups(model, lr=1.0)
    assert ids(group) == named(model, "plain.adapter.a", "plain.adapter.b")
    tunerkit.freeze(model, "plain")
    with pytest.raises(tunerkit.errors.StepError, match=r"every adapter is frozen.*tunerkit\.thaw"):
        tunerkit.param_groups(model, lr=1.0)


def test_shared_and_fixed_parameters_are_in_one_group_or_none() -> None:
    """What is shared is listed once; what is fixed is not trained."""
    from tests.support.toy_shared import SharedPlugin

    with registered(SharedPlugin()):
        model = tunerkit.wrap(net(), "toy-shared", TARGETS)
        (group,) = tunerkit.param_groups(model, lr=1.0)
        assert ids(group) == named(model, "adapter.v", "adapter.d")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", value) for value in ("1e-3", -1.0, float("nan"), None, True)),
        *(("weight_decay", value) for value in ("0", -1.0, float("nan"), False)),  # None leaves it to the optimizer
    ],
)
def test_a_wrong_number_is_refused(name: str, value: Any) -> None:
    """Before anything is asked of a plugin."""
    with pytest.raises(tunerkit.errors.StepError, match=f"expected a finite number >= 0 as {name}, got"):
        tunerkit.param_groups(wrapped(), **{"lr": 1.0, name: value})


class Answering(OneMethod, LowRankPlugin):
    """Answers `tunerkit_param_groups` with what a function makes of the tuner."""

    method = Method("toy-answering", config=LowRankConfig)

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @tunerkit.hookimpl
    def tunerkit_param_groups(self, tuner: Tuner) -> Any:
        return self.answer(list(tuner.parameters()))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda own: [ParamGroup([nn.Parameter(torch.ones(1))])], "not the adapter's"),
        (lambda own: [ParamGroup(own[:1]), ParamGroup(own)], "in two groups, or twice"),
    ],
)
def test_a_wrong_answer_of_the_hook_names_the_plugin(answer: Any, words: str) -> None:
    """And the adapter. Answers of other forms are tested in tests/hooks/test_answers.py."""
    with registered(Answering(answer)):
        model = wrapped("toy-answering")
        with pytest.raises(tunerkit.errors.PluginError, match=f"tunerkit_param_groups.*'toy-answering'.*{words}") as e:
            tunerkit.param_groups(model, lr=1.0)
    assert "for adapter 'default'" in str(e.value)


def test_a_resumed_loop_has_the_groups_again(tmp_path: Path) -> None:
    """The optimizer's state fits groups that were made anew."""

    def started(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-2))

    assert_resumes(wrapped, started, tmp_path, steps=3, stopped=2)


# --- Starts that are fitted to data -----------------------------------------------------------------------------------


def measured(request: StatisticsRequest, bases: Mapping[str, BaseLayer]) -> tuple[dict[str, Statistics], int]:
    """Statistics of inputs that vary along the first axes alone, from two batches of four."""
    shapes = {path: (request.inputs, base.in_features) for path, base in bases.items()}
    return {path: Statistics(rows=8, inputs=torch.eye(*shape), gradients=None) for path, shape in shapes.items()}, 2


def fitted(model: nn.Module) -> nn.Module:
    fit_start_(tunerkit.tuner(model), measured)
    return model


def test_a_start_and_ranks_follow_the_statistics_and_the_output_stays() -> None:
    """The hook gets what was measured at each target; its ranks stand in the history, at step 0."""
    model = fitted(wrapped("toy-inputs", rank=1))
    assert torch.equal(model(X), net()(X))
    tuner = tunerkit.tuner(model)
    for adapter in tuner.adapters().values():
        a = adapter.get_parameter("a").detach().abs()
        assert torch.equal(a @ a.T, torch.eye(len(a)))
        assert float(a[:, 4:].max()) == 0
    (change,) = tuner.history
    assert (change.step, change.ranks) == (0, tuner.ranks()) == (0, {"0": 4, "2": 4})


def test_while_it_is_fitted_the_model_evaluates_with_gradients_and_draws_stay_its_own() -> None:
    """Afterwards modes and the random state are as before, also if parts of the model had other modes."""

    def looking(request: StatisticsRequest, bases: Mapping[str, BaseLayer]) -> tuple[dict[str, Statistics], int]:
        torch.randn(3)
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled()
        return measured(request, bases)

    model = wrapped("toy-inputs")
    model.get_submodule("1").eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    with torch.no_grad():
        fit_start_(tunerkit.tuner(model), looking)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes


def test_a_start_that_needs_data_and_got_none_is_told_when_training_begins() -> None:
    """The warning names the method, the adapter and the call; a calibrated and a loaded adapter get none."""

    def said(model: nn.Module) -> list[str]:
        return [text for text in told(lambda: attached(model)) if "is initialized from data" in text]

    (text,) = said(wrapped("toy-inputs"))
    assert "'toy-inputs'" in text
    assert "adapter 'default' was not" in text
    assert "tunerkit.calibrate(model, batches) before attach" in text
    assert said(fitted(wrapped("toy-inputs"))) == []
    assert said(wrapped("toy-low-rank")) == []


@pytest.mark.filterwarnings("ignore:.*saved untrained")
def test_it_is_recorded_and_saved_and_a_loaded_adapter_knows_it(tmp_path: Path) -> None:
    """The file has how much data there was; the loaded adapter has the fitted ranks and values."""
    model = fitted(wrapped("toy-inputs"))
    step(model, torch.optim.SGD(trainable(model), lr=1.0))
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path))
    assert torch.equal(loaded(X), model(X))
    again = tunerkit.load(net(), tunerkit.save(loaded, tmp_path / "again"))
    for each in (model, loaded, again):
        assert tunerkit.tuner(each).progress.calibration == {"batches": 2, "rows": 8}
    tunerkit.save(wrapped("toy-inputs"), tmp_path / "never")
    assert tunerkit.tuner(tunerkit.load(net(), tmp_path / "never")).progress.calibration is None


def driven(model: nn.Module) -> nn.Module:
    vars(model)["optimizer"] = attached(model)  # it must live as long as the model
    return model


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    step(model, optimizer)
    return model


def reloaded(folder: Path) -> nn.Module:
    return tunerkit.load(net(), tunerkit.save(fitted(wrapped("toy-inputs")), folder), trainable=True)


STARTED: dict[str, tuple[Callable[[Path], nn.Module], str]] = {
    "attached": (lambda folder: driven(wrapped("toy-inputs")), "already attached to an optimizer.*right after"),
    "trained": (lambda folder: trained(m := wrapped("toy-inputs"), attached(m)), "already trained.*right after"),
    "trained without attach": (lambda folder: trained(m := wrapped("toy-inputs"), sgd(m)), "already trained"),
    "loaded": (reloaded, "already loaded from a file"),
    "merged": (lambda folder: tunerkit.merge(wrapped("toy-inputs")), "merged"),
    "needs none": (lambda folder: wrapped("toy-low-rank"), "'toy-low-rank' needs no data with its settings"),
}


@pytest.mark.filterwarnings("ignore:these adapters never ran", "ignore:.*is initialized from data")
@pytest.mark.parametrize("case", STARTED)
def test_what_is_no_new_adapter_is_refused_in_words(case: str, tmp_path: Path) -> None:
    """Nothing is measured, and no value changes."""
    build, words = STARTED[case]
    model = build(tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tunerkit.errors.AdapterError, match=f"(?s){words}"):
        fit_start_(tunerkit.tuner(model), lambda request, bases: pytest.fail("it was measured"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_inside_disabled_no_start_is_fitted() -> None:
    """The base alone would run there."""
    model = wrapped("toy-inputs")
    with tunerkit.disabled(model), pytest.raises(tunerkit.errors.AdapterError, match="disabled"):
        fitted(model)


class Fitting(OneMethod, FittedPlugin):
    """Answers `tunerkit_calibrate` with a given value."""

    method = Method("toy-fitting", config=LowRankConfig, statistics=StatisticsRequest(inputs=2))

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @tunerkit.hookimpl
    def tunerkit_calibrate(self) -> Any:  # type: ignore[override]
        return self.answer


@pytest.mark.parametrize("answer", [3, {"0": 1}, {"0": 1, "2": -1}, {"0": 1, "2": 1, "4": 1}, "ranks"])
def test_ranks_that_are_no_counts_for_the_targets_name_the_plugin(answer: object) -> None:
    """Ranks have to be counts for exactly the targets; then nothing is recorded."""
    with registered(Fitting(answer)):
        model = wrapped("toy-fitting")
        with pytest.raises(tunerkit.errors.PluginError, match=r"tunerkit_calibrate.*'toy-fitting'.*must return"):
            fitted(model)
        assert tunerkit.tuner(model).progress.calibration is None
