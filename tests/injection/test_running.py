"""Changes to a model while another thread is inside its forward are rejected."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import AdapterError
from tunerkit.injection import is_merged

if TYPE_CHECKING:
    from tests.support.toys import Toys


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
def held(model: nn.Module, waits: nn.Module) -> Iterator[None]:
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
        with pytest.raises(AdapterError, match=r"another thread runs this \w+, .*hold one lock"):
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


def interrupted_forward(model: Any) -> int:
    """Run a forward that is interrupted. Returns the number of the thread in which it ran."""
    model[1].interrupted = True
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 3))
    model[1].interrupted = False
    return threading.get_ident()


def test_a_thread_that_ended_in_a_forward_does_not_count(toys: "Toys") -> None:
    """The system gives its number to a thread that starts later and never runs the model."""
    model = model_of(toys)
    with ThreadPoolExecutor(1) as pool:
        number = pool.submit(interrupted_forward, model).result()
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(50)]
    try:
        for thread in threads:
            thread.start()
            if thread.ident == number:
                break
        assert number in {thread.ident for thread in threads}, "no thread got the number again"
        tunerkit.merge(model)
    finally:
        end.set()
    assert is_merged(model)


def test_a_thread_that_lives_on_after_an_interrupt_counts_until_its_next_forward(toys: "Toys") -> None:
    """No hook runs after an interrupt, so the error says what to do."""
    model = model_of(toys)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupted_forward, model).result()
        with pytest.raises(AdapterError, match=r"interrupted in the model's forward .* run the model there once more"):
            tunerkit.merge(model)
        pool.submit(model, torch.ones(1, 3)).result()
        tunerkit.merge(model)
    assert is_merged(model)
