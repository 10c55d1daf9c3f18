"""The detector: one warning if an adapter has no effect because the owner bypasses the layer's forward()."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunerkit
from tests.support.model_checks import attached, each_copy, silent, told
from tests.support.toys import PastForward, Running, Toys
from tunerkit.errors import TunerkitWarning
from tunerkit.injection.preconditions import refuse_rows
from tunerkit.steps.attachment import look


class Dropped(nn.Module):
    """Layers of which some are skipped, as LayerDrop does; each layer has two linear layers."""

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        make = (lambda: nn.Linear(3, 3)) if plain else (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
        self.blocks = nn.ModuleList(make() for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.blocks[0], self.blocks[2]):
            x = block(x)
        result: Tensor = self.named["b"](x)
        return result


def hooks(model: nn.Module) -> int:
    """Forward hooks and pre-hooks, without those that look at the model's arguments and at what nobody drives."""
    found = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook not in (refuse_rows, look) for hook in found)


def test_a_layer_whose_forward_is_bypassed_is_named_once(toys: "Toys") -> None:
    """The first forward names the path of each such layer and of no other; the second triggers no warning."""
    model = tunerkit.wrap(nn.Sequential(PastForward(), PastForward()), "toy-shift", {"targets": ["inner", "out"]})
    first = told(lambda: model(torch.ones(2, 3)))
    assert len(first) == 1
    assert "0.out, 1.out." in first[0]
    assert "inner" not in first[0]
    assert told(lambda: model(torch.ones(2, 3))) == []


def test_copies_and_biases_are_watched_too(toys: "Toys") -> None:
    """A trained copy or bias of a layer that never runs is as useless as an adapter there."""
    for config in ({"train_modules": ["0.out"]}, {"bias": "all"}):
        model = tunerkit.wrap(
            nn.Sequential(PastForward(), nn.Linear(3, 3)), "toy-shift", {"targets": ["inner"], **config}
        )
        assert "0.out." in told(lambda: model(torch.ones(2, 3)))[0]  # noqa: B023  # called at once


def test_a_second_adapter_does_not_hide_the_first(toys: "Toys") -> None:
    """After a second wrap before the first forward, the first adapter is still watched."""
    model = tunerkit.wrap(nn.Sequential(PastForward()), "toy-shift", {"targets": ["out"]})
    tunerkit.wrap(model, "toy-shift", {"targets": ["inner"]}, adapter="second")
    assert "0.out." in told(lambda: model(torch.ones(2, 3)))[0]


@pytest.mark.parametrize("plain", [False, True])
def test_what_a_choice_leaves_out_is_no_alarm(toys: "Toys", plain: bool) -> None:
    """Blocks skipped as a whole, and skipped layers of a list of which others ran, trigger no warning."""
    model = tunerkit.wrap(Dropped(plain=plain), "toy-shift", {"targets": "all-linear"})
    assert told(lambda: model(torch.ones(2, 3))) == []


def test_a_list_of_which_no_layer_runs_is_an_alarm(toys: "Toys") -> None:
    """If no layer of a list runs, its owner does not choose among them but bypasses all their forwards."""

    def run(model: Any, x: Tensor) -> Tensor:
        for layer in model.layers:
            x = F.linear(x, layer.weight)
        return x

    lists = Running(run, layers=nn.ModuleList(nn.Linear(3, 3) for _ in range(2)))
    model = tunerkit.wrap(nn.Sequential(lists), "toy-shift", {"targets": ["layers.0", "layers.1"]})
    assert "0.layers.0, 0.layers.1." in told(lambda: model(torch.ones(2, 3)))[0]


class Loop(nn.Module):
    """A module as Lightning trains it: its forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(PastForward(), nn.Linear(3, 3))

    def training_step(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found.square().mean()


def test_a_loop_that_calls_parts_of_the_model_triggers_a_warning_at_the_first_step(toys: "Toys") -> None:
    """If the whole model is never called, the warning comes at the first optimizer step, and only once."""
    model = tunerkit.wrap(Loop(), "toy-shift", {"targets": "all-linear"})
    optimizer = attached(model)
    model.training_step(torch.ones(2, 3)).backward()
    with pytest.warns(TunerkitWarning, match=r"owns their base layer did: net\.0\.out\."):
        optimizer.step()
    assert hooks(model) == 3
    model.training_step(torch.ones(2, 3)).backward()
    with silent(Warning):
        optimizer.step()


def test_a_step_before_anything_ran_leaves_the_watch(toys: "Toys") -> None:
    """Gradients may have another source, or come from compiled code that cannot be watched."""
    model = tunerkit.wrap(nn.Sequential(PastForward()), "toy-shift", {"targets": ["out"]})
    optimizer = attached(model)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "0.out." in told(lambda: model(torch.ones(2, 3)))[0]


@pytest.mark.parametrize("end", ["forward", "unwrap"])
def test_its_hooks_are_gone_after_the_first_forward_and_after_unwrap(toys: "Toys", end: str) -> None:
    """One hook per adapted module remains after the first forward, and none after unwrap."""
    model = tunerkit.wrap(toys.net(), "toy-shift", toys.full)
    assert hooks(model) > 7
    if end == "forward":
        model(toys.x())
        assert hooks(model) == 7  # 3 targets, 2 copies, 2 other biases
    else:
        tunerkit.unwrap(model)
        assert hooks(model) == 0
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    assert "_tunerkit_calls" not in vars(model)


@each_copy
def test_a_copy_is_watched_on_its_own(toys: "Toys", way: Any) -> None:
    """The copy's first forward warns about the copy; the original is still watched."""
    model = tunerkit.wrap(nn.Sequential(PastForward()), "toy-shift", {"targets": ["out", "inner"]})
    twin = way(model)
    assert len(told(lambda: twin(torch.ones(2, 3)))) == 1
    assert hooks(twin) == 2
    assert hooks(model) > 2
    assert len(told(lambda: model(torch.ones(2, 3)))) == 1
    assert hooks(model) == 2


def test_loading_watches_too(toys: "Toys", tmp_path: Any) -> None:
    """A loaded adapter that is never called has no effect either, so it is watched too."""
    torch.manual_seed(0)
    base = nn.Sequential(PastForward())
    path = tunerkit.save(tunerkit.wrap(copy.deepcopy(base), "toy-shift", {"targets": ["out"]}), tmp_path)
    assert "0.out." in told(lambda: tunerkit.load(base, path)(torch.ones(2, 3)))[0]


def test_a_model_that_was_changed_before_its_first_forward_is_warned_about(toys: "Toys") -> None:
    """A module around the adapted one moves its path: the warning still names the owner, and forward runs."""
    model = Running(lambda m, x: m.inner(x), inner=PastForward())
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["inner.out"]})
    model.inner = Running(lambda m, x: m.inner(x), inner=model.get_submodule("inner"))
    with pytest.warns(TunerkitWarning, match=r"never ran .*inner\.out"):
        model(torch.ones(2, 3))
