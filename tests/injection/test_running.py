"""Changes to a model while another thread is inside its forward are rejected."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toys import Toys
from tunerkit.errors import AdapterError
from tunerkit.injection import is_merged

CONFIG = {"targets": ["0", "2"]}


class Waits(nn.Module):
    """The identity. In a thread named ``held`` it waits until it is released; if it must, it is interrupted."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["arrived"], vars(self)["released"] = threading.Event(), threading.Event()
        self.interrupted = False

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread().name == "held":
            vars(self)["arrived"].set()
            vars(self)["released"].wait()
        if self.interrupted:
            raise KeyboardInterrupt
        return x


def model_of(toys: "Toys") -> Any:
    net = nn.Sequential(nn.Linear(3, 3), Waits(), nn.Linear(3, 3))
    return toys.fill_(tunerkit.wrap(net, "toy-low-rank", CONFIG, seed=1))


@contextmanager
def held(model: Callable[..., Any], waits: nn.Module) -> Iterator[None]:
    """Inside the block, another thread is in the middle of a forward of ``model``."""
    thread = threading.Thread(target=model, args=(torch.ones(1, 3),), name="held")
    thread.start()
    vars(waits)["arrived"].wait()
    try:
        yield
    finally:
        vars(waits)["released"].set()
        thread.join()


def enter_disabled(model: nn.Module) -> None:
    with tunerkit.disabled(model):
        pass


CHANGES: dict[str, Callable[[Any, Path], object]] = {
    "merge": lambda model, path: tunerkit.merge(model),
    "load": lambda model, path: tunerkit.load(model, path, adapter="second"),
    "wrap": lambda model, path: tunerkit.wrap(model, "toy-low-rank", CONFIG, adapter="second"),
    "delete": lambda model, path: tunerkit.delete(model, "default"),
    "activate": lambda model, path: tunerkit.activate(model, []),
    "unwrap": lambda model, path: tunerkit.unwrap(model),
    "disabled": lambda model, path: enter_disabled(model),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_another_thread_runs_is_not_changed(toys: "Toys", tmp_path: Path, change: str) -> None:
    """Half of the output would be of the model before, half of the one after. Later the same call works."""
    model = model_of(toys)
    tunerkit.save(model, tmp_path)
    before = toys.snapshot(model)
    with held(model, model[1]):
        with pytest.raises(AdapterError, match=r"another thread runs this \w+, .*with one lock"):
            CHANGES[change](model, tmp_path)
        assert toys.same(toys.snapshot(model), before)
        assert tunerkit.active(model) == ("default",)
    CHANGES[change](model, tmp_path)


def test_a_merged_model_that_runs_is_not_unmerged(toys: "Toys") -> None:
    """Unmerging writes the weights, as merging does."""
    model = tunerkit.merge(model_of(toys))
    with held(model, model[1]), pytest.raises(AdapterError, match="if unmerging changed"):
        tunerkit.unmerge(model)
    tunerkit.unmerge(model)


def test_another_model_that_runs_does_not_matter(toys: "Toys") -> None:
    """Only the forward of the model itself is seen, so a thread may run any other one."""
    model, other = model_of(toys), model_of(toys)
    with held(model, model[1]):
        tunerkit.merge(other)
    assert is_merged(other)
    assert not is_merged(model)


def interrupted_forward(model: Any) -> pytest.ExceptionInfo[KeyboardInterrupt]:
    """Run a forward that is interrupted; return the exception with its traceback."""
    model[1].interrupted = True
    with pytest.raises(KeyboardInterrupt) as interrupted:
        model(torch.ones(1, 3))
    model[1].interrupted = False
    return interrupted


def test_an_interrupted_forward_does_not_run(toys: "Toys") -> None:
    """Neither in a thread that ended, nor in one that lives on, nor while the traceback with its frames is kept."""
    model = model_of(toys)
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(interrupted_forward, model).result()
        tunerkit.merge(model)
    tunerkit.unmerge(model)
    assert kept.type is KeyboardInterrupt
    assert not is_merged(model)


def test_a_thread_may_change_the_model_inside_its_own_forward(toys: "Toys") -> None:
    """As a hook does that shows the base: it knows where it is."""
    model = model_of(toys)
    model[1].register_forward_hook(lambda *call: enter_disabled(model))
    assert model(torch.ones(1, 3)).isfinite().all()


def test_a_call_through_a_compiled_model_is_seen(toys: "Toys") -> None:
    """The wrapper that `torch.compile` returns calls the model, which another thread would change under it."""
    model = model_of(toys)
    refused = pytest.raises(AdapterError, match="another thread runs this Sequential")
    with held(torch.compile(model, backend="eager"), model[1]), refused:
        tunerkit.merge(model)
    tunerkit.merge(model)
