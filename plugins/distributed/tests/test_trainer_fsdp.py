"""A Trainer, and a loop with accelerate, under FSDP2 and under DDP: like one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit

pytest.importorskip("tunerkit_adalora", reason="it is tried with AdaLoRA")
pytest.importorskip("tunerkit_lora", reason="it is tried with LoRA")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from plugins.distributed.tests import trainer_runs
from plugins.distributed.tests.trainer_runs import METHODS
from tests.support import two_processes

CLOSE = 1e-12  # in float64, where other orders of sums led to 5e-15 with any of three instruction sets


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes meet and write."""
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def runs(place: Path) -> list[dict[str, Any]]:
    """What two processes found, by process: importing what they need takes longer than all that they do."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    two_processes.spawn(trainer_runs.run_all, (str(place),))
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(2)]


def are_equal(here: dict[str, Any], there: dict[str, Any], within: float) -> bool:
    pairs = [(here["weights"][name], weight) for name, weight in there["weights"].items()]
    weights = all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=within) for a, b in pairs)
    masks = all(torch.equal(*pair) for pair in zip(here["masks"], there["masks"], strict=True))
    return weights and masks and here["history"] == there["history"]


def test_a_trainer_under_ddp_shrinks_and_resumes_like_one_process(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    """Checkpoints hold the smaller shapes, also none for a layer without a triplet, and resuming is exact."""
    for number, method in enumerate(trainer_runs.UNDER_DDP):
        alone = trainer_runs.train(trainer_runs.build(method), tmp_path / f"alone{number}", 1)
        for found in (run["trainer, ddp"] for run in runs):
            assert are_equal(found[method], alone, within=CLOSE), method
            assert all(are_equal(found[method, stop], found[method], within=0.0) for stop in trainer_runs.STOPS), method


def test_an_accelerate_loop_under_ddp_shrinks_and_resumes_like_one_process(runs: list[dict[str, Any]]) -> None:
    """With accelerate's own checkpoints, which are loaded when DDP is there already, and with those of adapters."""
    for method in trainer_runs.UNDER_DDP:
        alone = trainer_runs.loop_alone(method)
        for found in (run["loop, ddp"] for run in runs):
            for way in (True, False):
                assert are_equal(found[method, way], alone, within=CLOSE), (method, way)
                for stop in trainer_runs.STOPS:
                    assert are_equal(found[method, way, stop], found[method, way], within=0.0), (method, way, stop)


def test_a_trainer_under_fsdp2_trains_and_resumes_like_one_process(
    runs: list[dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    """The base is sharded, adapters are whole and shrink. Its checkpoints hold adapters, and resuming is exact."""
    runs = [run["trainer"] for run in runs]
    for number, method in enumerate(METHODS):
        alone = trainer_runs.train(trainer_runs.build(method), tmp_path / f"alone{number}", 1)
        for run in runs:
            found = run[method]
            assert found["sharded"] == len(list(trainer_runs.base().parameters()))
            assert are_equal(found, alone, within=CLOSE), method
            assert are_equal(found["resumed"], found, within=0.0), method
            assert {"adapter.safetensors", "optimizer.pt", "scheduler.pt"} < set(found["files"])
            assert not any("fsdp" in name or name.startswith("model") for name in found["files"])
        loaded = tunerkit.load(trainer_runs.base(), place / "trainer" / f"run{number}" / "end")
        assert are_equal(runs[0][method], {**trainer_runs.results(loaded), "history": alone["history"]}, within=0.0)
    for run in runs:
        assert 'Set "version": 2 in fsdp_config' in run["refused"]["fsdp1"]
        assert '"cpu_ram_efficient_loading": False' in run["refused"]["ram"]
        assert "besides the adapters, the optimizer trains 1 parameters" in run["refused"]["base"]


def test_an_accelerate_loop_under_fsdp2_trains_and_resumes_like_one_process(
    runs: list[dict[str, Any]],
) -> None:
    """With adapters left out of sharding, and with sharded ones, which do not shrink.

    FSDP2 sums the gradients of shards in another order, and Adam scales what it rounds.
    """
    loops: list[dict[Any, Any]] = [run["loop"] for run in runs]
    for method in METHODS:
        for ignored, _ in trainer_runs.LOOPS:
            stays: dict[str, Any] = {} if ignored or method == "lora" else {"shrink": False}
            alone = trainer_runs.loop_alone(method, **stays)
            for run in loops:
                found = run[method, ignored]
                assert are_equal(found, alone, within=CLOSE), (method, ignored)
                assert are_equal(found["resumed"], found, within=0.0), (method, ignored)
                assert found["resumed"]["steps"] == trainer_runs.STOP
                assert {"adapter.safetensors", "optimizer.pt"} < set(found["resumed"]["files"])
                assert not any("fsdp" in name for name in found["resumed"]["files"])


def test_merging_under_fsdp2_is_that_of_one_process(runs: list[dict[str, Any]]) -> None:
    """Each process adds its part. Unmerging restores every shard, and what is saved while merged loads elsewhere."""
    for run in runs:
        for case, found in run["merge"].items():
            largest = float(found["adapted"].abs().max())
            assert not torch.allclose(found["base"], found["adapted"], atol=1e-2), case
            for name in ("merged", "permanent", "loaded"):
                assert torch.allclose(found[name], found["adapted"], rtol=0, atol=1e-5 * largest), (case, name)
            assert torch.equal(found["merged again"], found["merged"])
            assert torch.equal(found["base while merged"], found["base"])
            assert torch.equal(found["unmerged"], found["adapted"])
            assert found["shards restored"]
