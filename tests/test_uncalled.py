"""The detector: an adapter whose base layer's owner reads the weight past forward is told, once, and no other."""

import copy
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import TunerkitWarning

if TYPE_CHECKING:
    from tests.conftest import Toys


class PastForward(nn.Module):
    """Reads one projection past its forward, as attention does with its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.out = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.out.weight, self.out.bias)


class Dropped(nn.Module):
    """Layers of which some are left out, as LayerDrop does; each layer has two linear layers."""

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


def told(model: nn.Module, x: Tensor) -> list[str]:
    """What a forward warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
    return [str(warning.message) for warning in caught if issubclass(warning.category, TunerkitWarning)]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_layer_read_past_its_forward_is_named_once(toys: "Toys") -> None:
    """The first forward names the path of each such layer and of no other; the second is silent."""
    model = tunerkit.wrap(nn.Sequential(PastForward(), PastForward()), "toy-shift", {"targets": ["inner", "out"]})
    first = told(model, torch.ones(2, 3))
    assert len(first) == 1
    assert "0.out, 1.out." in first[0]
    assert "inner" not in first[0]
    assert told(model, torch.ones(2, 3)) == []


def test_copies_and_biases_are_watched_too(toys: "Toys") -> None:
    """A trained copy or bias of a layer that never runs has no more effect than an adapter."""
    for config in ({"train_modules": ["0.out"]}, {"bias": "all"}):
        model = tunerkit.wrap(
            nn.Sequential(PastForward(), nn.Linear(3, 3)), "toy-shift", {"targets": ["inner"], **config}
        )
        assert "0.out." in told(model, torch.ones(2, 3))[0]


def test_a_second_adapter_does_not_hide_the_first(toys: "Toys") -> None:
    """Wrapping again before the first forward goes on watching what was watched."""
    model = tunerkit.wrap(nn.Sequential(PastForward()), "toy-shift", {"targets": ["out"]})
    tunerkit.wrap(model, "toy-shift", {"targets": ["inner"]}, adapter="second")
    assert "0.out." in told(model, torch.ones(2, 3))[0]


@pytest.mark.parametrize("plain", [False, True])
def test_what_a_choice_leaves_out_is_no_alarm(toys: "Toys", plain: bool) -> None:
    """Blocks left out as a whole, and layers of a list of which others ran, are told by nobody."""
    model = tunerkit.wrap(Dropped(plain=plain), "toy-shift", {"targets": "all-linear"})
    assert told(model, torch.ones(2, 3)) == []


def test_a_list_of_which_no_layer_runs_is_an_alarm(toys: "Toys") -> None:
    """An owner that reads all its layers past their forward has not chosen among them."""

    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = F.linear(x, layer.get_parameter("weight"))
            return x

    model = tunerkit.wrap(nn.Sequential(Lists()), "toy-shift", {"targets": ["layers.0", "layers.1"]})
    assert "0.layers.0, 0.layers.1." in told(model, torch.ones(2, 3))[0]


class Loop(nn.Module):
    """What Lightning trains: its forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(PastForward(), nn.Linear(3, 3))

    def training_step(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found.square().mean()


def test_a_loop_that_calls_parts_of_the_model_is_told_at_the_first_step(toys: "Toys") -> None:
    """Where the whole is never called, the first step of the optimizer tells; the second is silent."""
    model = tunerkit.wrap(Loop(), "toy-shift", {"targets": "all-linear"})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer)
    model.training_step(torch.ones(2, 3)).backward()
    with pytest.warns(TunerkitWarning, match=r"owns their base layer did: net\.0\.out\."):
        optimizer.step()
    assert hooks(model) == 3
    model.training_step(torch.ones(2, 3)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_step_before_anything_ran_leaves_the_watch(toys: "Toys") -> None:
    """Gradients may come from elsewhere, or from compiled code that nobody can watch."""
    model = tunerkit.wrap(nn.Sequential(PastForward()), "toy-shift", {"targets": ["out"]})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "0.out." in told(model, torch.ones(2, 3))[0]


@pytest.mark.parametrize("end", ["forward", "unwrap"])
def test_its_hooks_are_gone_after_the_first_forward_and_after_unwrap(toys: "Toys", end: str) -> None:
    """One hook per adapted module is left, or none."""
    model = tunerkit.wrap(toys.net(), "toy-shift", toys.full)
    assert hooks(model) > 7
    if end == "forward":
        model(toys.x())
        assert hooks(model) == 7  # 3 targets, 2 copies, 2 other biases
    else:
        tunerkit.unwrap(model)
        assert hooks(model) == 0
    assert "_tunerkit_calls" not in vars(model)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_watched_on_its_own(toys: "Toys", way: Any) -> None:
    """The copy's first forward tells about the copy and leaves the original watched."""
    model = tunerkit.wrap(nn.Sequential(PastForward()), "toy-shift", {"targets": ["out", "inner"]})
    twin = way(model)
    assert len(told(twin, torch.ones(2, 3))) == 1
    assert hooks(twin) == 2
    assert hooks(model) > 2
    assert len(told(model, torch.ones(2, 3))) == 1
    assert hooks(model) == 2


def test_loading_watches_too(toys: "Toys", tmp_path: Any) -> None:
    """A loaded adapter that is never called is as much in vain."""
    torch.manual_seed(0)
    base = nn.Sequential(PastForward())
    path = tunerkit.save(tunerkit.wrap(copy.deepcopy(base), "toy-shift", {"targets": ["out"]}), tmp_path)
    assert "0.out." in told(tunerkit.load(base, path), torch.ones(2, 3))[0]
