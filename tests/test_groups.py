"""A process group without the plugin that keeps its adapters alike: refused, never trained apart in silence."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import hooks
from tunerkit.hooks.registry import Registry
from tunerkit.serialization import sharded_weights
from tunerkit_testing.small import trainable

if TYPE_CHECKING:
    from tests.support.toys import Toys

TARGETS = {"targets": ["layers.0"]}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plugin knows of processes, whatever is installed."""
    monkeypatch.setattr(hooks, "engine", lambda *_: None)
    monkeypatch.setattr(hooks, "gather_shardings", tuple)
    monkeypatch.setattr(Registry, "absence", lambda self, name: f"{name} is not installed")


@pytest.fixture
def _group() -> Iterator[None]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def attached(toys: "Toys", **options: Any) -> Any:
    model = tunerkit.wrap(toys.net(), "toy-low-rank", TARGETS)
    tunerkit.attach(model, torch.optim.SGD(trainable(model), lr=0.1), total_steps=3, **options)
    return model


@pytest.mark.usefixtures("_group")
def test_a_process_of_a_group_is_refused_with_the_extra(toys: "Toys") -> None:
    """Also one of one process: DDP may be around it. Meant to be apart, it trains, and its shapes stay."""
    said = r'tunerkit-distributed is not installed \(pip install "tunerkit\[distributed\]"\)'
    for asked in (None, True):
        with pytest.raises(tunerkit.StepError, match=said):
            attached(toys, data_parallel=asked)
    model = attached(toys, data_parallel=False)
    optimizer = tunerkit.optimizer_of(tunerkit.tuner(model))
    assert "DDP" in str(tunerkit.resize_obstacle(trainable(model), optimizer))


def test_a_launcher_is_believed_and_one_process_trains(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE says that there are others; without it, and with 1, there are none."""
    for world in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert tunerkit.tuner(attached(toys)).engine.name == "one process"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tunerkit.StepError, match="would train its own in silence"):
        attached(toys)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(tunerkit.StepError, match="or has to be"):
        attached(toys, data_parallel=True)
    wrong: Any = "yes"
    with pytest.raises(tunerkit.StepError, match=re.escape("data_parallel: expected True, False or None, got 'yes'")):
        attached(toys, data_parallel=wrong)


@pytest.mark.usefixtures("_group")
def test_a_weight_that_is_cut_is_refused_with_the_extra() -> None:
    """Taken for a whole one, a merge would write into a part of it."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4))
    assert not sharded_weights.is_split(model)
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(tunerkit.AdapterError, match=r"a weight is a DTensor.*tunerkit\[distributed\]"):
        sharded_weights.is_split(model)
