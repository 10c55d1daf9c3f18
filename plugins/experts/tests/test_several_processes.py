"""Adapters on experts in two processes: DDP and FSDP2 train as one process does; expert parallelism is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import tunerkit
from plugins.experts.tests import parallel_runs
from plugins.experts.tests.parallel_runs import ENGINES, METHODS
from plugins.experts.tests.tiny_mixtral import gap, logits, mixtral, wrapped
from tests.support import two_processes
from tunerkit.errors import TargetError

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What two processes found, by process, engine and method."""
    folder = tmp_path_factory.mktemp("experts")
    two_processes.spawn(parallel_runs.train_all, (str(folder),))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(runs: list[dict[Any, Any]], engine: str, method: str, tmp_path: Path) -> None:
    """The same weights up to rounding, and alike in both processes; what they save loads in one."""
    expected = parallel_runs.train("alone", method, tmp_path)
    for own in runs:
        found = own[engine, method]
        assert found["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            assert gap(found["weights"][name], weight) <= 1e-5
            assert torch.equal(found["weights"][name], runs[0][engine, method]["weights"][name])
        assert gap(found["trained"], expected["trained"]) <= 1e-5
        assert gap(logits(tunerkit.load(mixtral(), found["file"])), expected["trained"]) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_merges_where_it_was_trained(runs: list[dict[Any, Any]], engine: str, method: str) -> None:
    """Also into the shards of a stack, whose first dimension is that of the experts; and back bit for bit."""
    for own in runs:
        found = own[engine, method]
        assert gap(found["merged"], found["trained"]) <= 1e-5
        assert torch.equal(found["unmerged"], found["trained"])


def test_expert_parallelism_is_refused() -> None:
    """Each process has some of the experts only, and its routes count those: the error says to load without it."""
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.experts._is_expert_parallel = True
    with pytest.raises(TargetError, match=r"gate_up_proj and 1 more like it: is sharded by expert parallelism, .*load"):
        wrapped("lora", model)
