"""What plugins answer: each answer is checked once, and an exception names the plugin, the hook and the place."""

import asyncio
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import hooks, plugin
from tunerkit.errors import PluginError, TunerkitWarning
from tunerkit.plugin import AdapterConfig, BaseLayer, Method, ParamGroup, RankChange
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import Shift

PATHS = ("0", "1")
# The call of the user in which each hook fires; each takes a wrapped model, its optimizer and a folder.
FIRES: dict[str, Callable[[nn.Module, torch.optim.Optimizer, Path], object]] = {
    "tunerkit_build_adapter": lambda model, optimizer, folder: tunerkit.wrap(model, "toy-odd", adapter="second"),
    "tunerkit_start": lambda model, optimizer, folder: tunerkit.attach(model, optimizer, total_steps=4),
    "tunerkit_before_step": lambda model, optimizer, folder: step(model, optimizer),
    "tunerkit_after_step": lambda model, optimizer, folder: step(model, optimizer),
    "tunerkit_finish": lambda model, optimizer, folder: tunerkit.tuner(model).finish(),
    "tunerkit_budget": lambda model, optimizer, folder: tunerkit.tuner(model).budget(3),
    "tunerkit_shared": lambda model, optimizer, folder: tunerkit.wrap(model, "toy-odd", adapter="second"),
    "tunerkit_param_groups": lambda model, optimizer, folder: tunerkit.param_groups(model, lr=1.0),
    "tunerkit_delta": lambda model, optimizer, folder: tunerkit.merge(model),
    "tunerkit_factors": lambda model, optimizer, folder: tunerkit.merge(model),
    "tunerkit_from_factors": lambda model, optimizer, folder: convert(model),
    "tunerkit_state": lambda model, optimizer, folder: tunerkit.save_state(model, folder),
    "tunerkit_restore": lambda model, optimizer, folder: restore(model, optimizer, folder),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    tunerkit.load_state(model, tunerkit.save_state(model, folder))


# What each hook is asked about, if that is not an adapter as a whole.
PLACES = {
    **dict.fromkeys(("tunerkit_build_adapter", "tunerkit_delta", "tunerkit_factors"), "'0'"),
    **dict.fromkeys(("tunerkit_shared", "tunerkit_from_factors"), "2 targets"),
}


def convert(model: nn.Module) -> None:
    products = {path: plugin.Factors(q=torch.ones(1, 3), p=torch.ones(3, 1)) for path in PATHS}
    hooks.from_factors("toy-odd", tunerkit.tuner(model).targets, products)


@attrs.frozen
class OddConfig(AdapterConfig):
    """Nothing to set."""


@attrs.frozen
class OtherConfig(AdapterConfig):
    """Of another method."""


def shift() -> Shift:
    return Shift(cast(BaseLayer, nn.Linear(3, 3)))


def odd(hook: str, answer: Callable[[], object], *, from_call: int = 1) -> types.ModuleType:
    """A plugin with the method ``toy-odd`` whose ``hook`` returns what ``answer()`` does, from its n-th call on."""
    plugin = types.ModuleType("odd")
    calls: list[str] = []

    def methods() -> list[Method]:
        return [Method("toy-odd", config=OddConfig)]

    def build(base: BaseLayer) -> object:
        return Shift(base)

    def implementation() -> object:
        calls.append(hook)
        return answer() if len(calls) >= from_call else shift()

    for name, function in {"tunerkit_methods": methods, "tunerkit_build_adapter": build, hook: implementation}.items():
        mark: Any = tunerkit.hookimpl
        setattr(plugin, name, mark(function))
    return plugin


def fire(hook: str, answer: Callable[[], object], folder: Path) -> nn.Module:
    """Wrap, attach and do what makes ``hook`` fire; the plugin answers with ``answer()``."""
    with registered(odd(hook, answer, from_call={"tunerkit_build_adapter": 3, "tunerkit_shared": 2}.get(hook, 1))):
        model = tunerkit.wrap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "toy-odd")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if hook != "tunerkit_start":
            tunerkit.attach(model, optimizer, total_steps=4)
        FIRES[hook](model, optimizer, folder)
    return model


def raising(error: BaseException) -> Callable[[], object]:
    def answer() -> object:
        raise error

    return answer


Delta: Any = plugin.Delta  # Any: what the records hold here is wrong on purpose
State: Any = plugin.State
Factors: Any = plugin.Factors
Group: Any = ParamGroup
WRONG: dict[str, tuple[object, ...]] = {
    "tunerkit_build_adapter": (None, 3, nn.Linear(1, 1)),
    "tunerkit_before_step": (True, ["v"], torch.ones(2), [None]),
    "tunerkit_after_step": (3, "0", [1, 2], {"0": 1}, {"0": 1, "1": 1, "2": 1}, {"0": 1, "1": -1}, {"0": 1, "1": 0.5},
                            {"0": 1, "1": True}, {"0": None, "1": 1}, {0: 1, 1: 1}, {"0": "1", "1": "1"}),
    "tunerkit_finish": (False, {}, {"0": torch.ones(2), "1": 1}),
    "tunerkit_budget": (-1, 2.5, "8", True, [8], float("nan"), torch.ones(2)),
    "tunerkit_delta": (None, torch.ones(3, 3), Delta(weight="w"), Delta(weight=torch.ones(2, 3)),
                       Delta(bias=torch.ones(3, 3)), Delta(weight=torch.ones(3, 3).int()),
                       Delta(bias=[0.0, 0.0, 0.0]), Delta(bias=torch.ones(3, device="meta"))),
    "tunerkit_shared": (3, torch.ones(2), Shift, [nn.ReLU()]),
    "tunerkit_param_groups": (3, torch.ones(2), [3], {"lr": 1.0}, [Group([nn.Parameter(torch.ones(1))])]),
    "tunerkit_factors": (None, Delta(), torch.ones(3, 3), (torch.ones(1, 3), torch.ones(3, 1)),
                         Factors(q=torch.ones(1, 3), p=torch.ones(1, 3)), Factors(q=torch.ones(3), p=torch.ones(3, 1)),
                         Factors(q=torch.ones(2, 3), p=torch.ones(3, 1)),
                         Factors(q=torch.ones(1, 2), p=torch.ones(3, 1)),
                         Factors(q=torch.ones(()), p=torch.ones(3, 1)), Factors(q="q", p=torch.ones(3, 1)),
                         Factors(q=torch.ones(1, 3), p=None), Factors(q=torch.ones(1, 3).int(), p=torch.ones(3, 1)),
                         Factors(q=torch.ones(1, 3), p=torch.ones(3, 1, device="meta"))),
    "tunerkit_from_factors": (None, OddConfig(), (OddConfig(),), (OddConfig(), {}),
                              ({}, {"0": shift(), "1": shift()}),
                              (OddConfig(), [shift(), shift()]), (OddConfig(), {"0": shift()}),
                              (OddConfig(), {"0": shift(), "1": shift(), "2": shift()}),
                              (OddConfig(), {"0": shift(), "1": nn.Linear(3, 3)}),
                              (OtherConfig(), {"0": shift(), "1": shift()})),
    "tunerkit_state": (3, {}, State(tensors={}, values={"a": torch.ones(1)}),
                       State(tensors={}, values={"a": float("inf")}), State(tensors={}, values={"a": {1: 2}})),
    "tunerkit_restore": (3, False, State(tensors={}, values={})),
}  # fmt: skip


@pytest.mark.parametrize(
    ("hook", "answer"),
    [(hook, answer) for hook, answers in WRONG.items() for answer in answers],
    ids=[f"{hook}-{number}" for hook, answers in WRONG.items() for number in range(len(answers))],
)
def test_a_wrong_answer_is_refused_with_plugin_hook_and_place(hook: str, answer: object, tmp_path: Path) -> None:
    """One form of message for each hook: what was returned by whom, for which adapter or target, what is expected."""
    place = PLACES.get(hook, "adapter 'default'")
    words = rf"{hook} of the plugin of method 'toy-odd' \(in-process\) returned .+ for {place}; it must return .+"
    with pytest.raises(PluginError, match=words) as caught:
        fire(hook, lambda: answer, tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_record_with_a_wrong_field_is_refused_where_the_plugin_makes_it(tmp_path: Path) -> None:
    """The error names the plugin, the field, its value and what is allowed; its cause leads to the plugin's line."""
    hook, answer = "tunerkit_param_groups", lambda: [Group([], lr_scale="fast")]
    words = (
        r"plugin of method 'toy-odd' \(in-process\) failed for adapter 'default': lr_scale of a ParamGroup is 'fast'"
    )
    with pytest.raises(PluginError, match=rf"{hook} of the {words}; expected float") as caught:
        fire(hook, answer, tmp_path)
    assert caught.value.__cause__ is not None
    assert answer.__code__ in [frame.f_code for frame, _ in traceback.walk_tb(caught.value.__cause__.__traceback__)]


def test_a_circular_state_is_refused(tmp_path: Path) -> None:
    """A list that contains itself cannot be written as JSON."""
    circular: list[object] = []
    circular.append(circular)
    with pytest.raises(PluginError, match=r"state's value 'a'.*JSON can hold"):
        fire("tunerkit_state", lambda: plugin.State(tensors={}, values={"a": circular}), tmp_path)


def test_right_answers_in_other_types_are_taken(tmp_path: Path) -> None:
    """Integers of numpy are counts, ranks come in the order of the targets, and a generator lists parameters."""
    model = fire("tunerkit_after_step", lambda: {"1": np.int64(1), "0": torch.tensor(2)}, tmp_path)
    (change,) = tunerkit.tuner(model).history
    assert list(change.ranks.items()) == [("0", 2), ("1", 1)]
    assert all(type(rank) is int for rank in change.ranks.values())
    fire("tunerkit_before_step", lambda: (p for p in [nn.Parameter(torch.ones(1))]), tmp_path)
    values = {"a": [1, 2.5, "x", None, True, {"b": []}]}
    fire("tunerkit_state", lambda: plugin.State(tensors={"t": torch.ones(1)}, values=values), tmp_path)


@pytest.mark.parametrize("hook", FIRES)
def test_an_exception_keeps_its_class_and_names_plugin_hook_and_place(hook: str, tmp_path: Path) -> None:
    """A caller may catch torch's out-of-memory error; the traceback says which plugin raised it, and where."""
    place = PLACES.get(hook, "adapter 'default'")
    with pytest.raises(torch.OutOfMemoryError, match="too large") as caught:
        fire(hook, raising(torch.OutOfMemoryError("too large")), tmp_path)
    shown = "".join(traceback.format_exception(caught.value))
    assert f"raised by {hook} of the plugin of method 'toy-odd' (in-process), for {place}" in shown


@pytest.mark.parametrize("hook", FIRES)
@pytest.mark.parametrize(
    "error", [SystemExit(0), GeneratorExit(), asyncio.CancelledError()], ids=lambda e: type(e).__name__
)
def test_what_would_end_the_program_becomes_an_error(hook: str, error: BaseException, tmp_path: Path) -> None:
    """A plugin that calls sys.exit(0) in a step must not end the training as if all were well."""
    with pytest.raises(PluginError, match=rf"{hook} of .*'toy-odd'.* raised {type(error).__name__}"):
        fire(hook, raising(error), tmp_path)


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError("late"), ValueError), (SystemExit(3), PluginError)], ids=["error", "exit"]
)
def test_a_generator_that_raises_names_the_plugin_too(
    error: BaseException, raised: type[Exception], tmp_path: Path
) -> None:
    """Its body runs only when the answer is read."""

    def answer() -> Any:
        raise error
        yield

    with pytest.raises(raised) as caught:
        fire("tunerkit_before_step", answer, tmp_path)
    assert "tunerkit_before_step of the plugin of method 'toy-odd'" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("hook", FIRES)
def test_ctrl_c_inside_a_hook_reaches_the_user(hook: str, tmp_path: Path) -> None:
    """A KeyboardInterrupt is the user's."""
    with pytest.raises(KeyboardInterrupt):
        fire(hook, raising(KeyboardInterrupt()), tmp_path)


@pytest.mark.parametrize("hook", [*FIRES, "tunerkit_ranks_changed"])
def test_a_signal_handler_that_exits_ends_the_program_inside_a_hook(hook: str, tmp_path: Path) -> None:
    """A job that is preempted gets SIGTERM, and its handler calls sys.exit: that is no failure of the plugin."""

    def stop(number: int, frame: object) -> None:
        sys.exit(143)

    def interrupted(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(1000):  # Python calls the handler between two of these
            pass

    class Watching:
        @tunerkit.hookimpl
        def tunerkit_ranks_changed(self) -> None:
            interrupted()

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        if hook in FIRES:
            with pytest.raises(SystemExit, match="143"):
                fire(hook, interrupted, tmp_path)
        else:
            with registered(Watching()), pytest.raises(SystemExit, match="143"):
                fire("tunerkit_after_step", lambda: dict.fromkeys(PATHS, 1), tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("error", [SystemExit(1), asyncio.CancelledError(), ValueError("no network")])
def test_a_watcher_that_raises_does_not_end_a_training(error: BaseException, tmp_path: Path) -> None:
    """Each failure is a warning; the watcher is notified again next time, and the others always are."""
    seen: list[str] = []

    class Failing:
        @tunerkit.hookimpl
        def tunerkit_ranks_changed(self) -> None:
            seen.append("failing")
            raise error

    class Watching:
        @tunerkit.hookimpl
        def tunerkit_ranks_changed(self, change: RankChange) -> None:
            seen.append(f"step {change.step}")

    with (
        registered(Failing(), Watching()),
        pytest.warns(TunerkitWarning, match=r"tunerkit_ranks_changed of plugin 'Failing'"),
    ):
        model = fire("tunerkit_after_step", lambda: dict.fromkeys(PATHS, 1), tmp_path)
    assert tunerkit.tuner(model).steps == 1
    assert seen == ["failing", "step 1"]
