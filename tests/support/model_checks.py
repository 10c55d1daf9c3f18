"""Checks of a wrapped model that several test files use."""

import copy
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tunerkit
from tests.support.toys import Toys
from tunerkit.errors import TunerkitWarning
from tunerkit_testing import check_method
from tunerkit_testing.cases import Case
from tunerkit_testing.small import trainable


@contextmanager
def untouched(toys: "Toys", model: nn.Module) -> Iterator[None]:
    """Check that the model is unchanged after the block, whatever happens inside."""
    before = toys.snapshot(model)
    yield
    assert toys.same(toys.snapshot(model), before)


@contextmanager
def silent(kind: type[Warning] = TunerkitWarning) -> Iterator[None]:
    """Check that the block triggers no warning of a kind: any is an error in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", kind)
        yield


def told(call: Callable[[], object], file: str | None = None) -> list[str]:
    """The texts of our warnings in a call, each of which points into ``file``, if one is named."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [each for each in caught if issubclass(each.category, TunerkitWarning)]
    assert file is None or all(each.filename == file for each in ours)
    return [str(each.message) for each in ours]


def pickled(value: Any) -> Any:
    """A copy through pickle, as a spawned worker gets it."""
    return pickle.loads(pickle.dumps(value))


each_copy = pytest.mark.parametrize("way", [copy.deepcopy, pickled])


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    """A plain optimizer of all that is trained."""
    return torch.optim.SGD(trainable(model), lr=0.1, **options)


def attached(model: nn.Module, **options: Any) -> Optimizer:
    """The same, which drives the adapters."""
    optimizer = sgd(model)
    tunerkit.attach(model, optimizer, **options)
    return optimizer


def fit(model: nn.Module, optimizer: Optimizer, x: Tensor, steps: int = 1) -> None:
    """Take steps towards outputs of 0."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def nudge_(model: nn.Module, *adapters: str) -> nn.Module:
    """Stand in for training: 0.1 is added to all that the adapters named, or all there are, train."""
    with torch.no_grad():
        for name in adapters or tunerkit.adapters(model):
            for parameter in tunerkit.tuner(model, name).parameters():
                parameter.add_(0.1)
    return model


# What holds of any method, by the names of the kit's checks.
COMMON = (
    *("start", "building_keeps_the_base", "steps_keep_the_base", "every_tensor_moves", "loss_falls", "merges"),
    *("disabled_is_the_base", "saves_and_loads", "deepcopy", "pickle", "keeps_merged", "unwraps"),
)


def check_common(method: str, case: Case, *more: str, skipped: Collection[str] = ()) -> None:
    """A method passes the kit's checks of `COMMON` and ``more``; those that do not concern it are ``skipped``."""
    results = check_method(method, cases=[case], checks=[*COMMON, *more])
    expected = {name: "skipped" if name in skipped else "passed" for name in (*COMMON, *more)}
    assert {each.check: each.status for each in results} == expected, results


def losing(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()  # type: ignore[no-any-return]
