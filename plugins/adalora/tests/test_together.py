"""AdaLoRA in several processes: the ranks, the history and the weights of one process on the same batches."""

import os
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import tunerkit
from tests.support import together
from tests.support.together import Job

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

SCHEDULE = {"targets": ["0", "2"], "t_init": 2, "t_final": 3, "delta_t": 1, "adapter_dtype": "float64"}
# With its SVD at each allocation, as by default, and without, where the optimizer trains λ.
CONFIGS: dict[str, dict[str, Any]] = {
    "8 to 2": {**SCHEDULE, "init_rank": 8, "target_rank": 2},
    "6 to 4": {**SCHEDULE, "init_rank": 6, "target_rank": 4, "exact_svd": False, "train_lambda": True},
}
# The dtype of most trainings, where other orders of sums lead further apart.
FLOAT32 = "8 to 2 in float32"
WITH_FLOAT32 = {**CONFIGS, FLOAT32: {**CONFIGS["8 to 2"], "adapter_dtype": "float32"}}
LONG = os.environ.get("TUNERKIT_LONG") == "1"
# Before, during and after pruning: the schedule of 12 steps prunes in 3 to 9.
STOPS = (0, 1, 5, 10) if LONG else (0,)
SHORT = [("plain", "6 to 4", 5), ("fsdp2", "8 to 2", 5), ("fsdp2 sharded", "8 to 2", 5)]
CELLS = [
    *((engine, config, stop) for engine in together.ENGINES for config in CONFIGS for stop in STOPS),
    ("plain", FLOAT32, 0),
    *(() if LONG else SHORT),
]
KEEPS_SHAPES = ("fsdp2 sharded",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """What two processes found in each cell, by process."""
    jobs = [Job(engine, "adalora", WITH_FLOAT32[config], stop=stop) for engine, config, stop in CELLS]
    return dict(zip(CELLS, together.together(jobs, tmp_path_factory.mktemp("jobs")), strict=True))


def assert_like_one(job: Job, results: list[dict[str, Any]], folder: Path) -> None:
    """The processes agree in every bit, and with one process up to rounding, after the same steps.

    Where shapes stay, one process keeps them too: clipping counts the gradients of masked triplets.
    """
    config = {**job.config, "shrink": job.engine not in KEEPS_SHAPES}
    one = together.train(attrs.evolve(job, engine="alone", config=config, stop=0), folder)
    within = 1e-12 if job.dtype is torch.float64 else 1e-6
    for each in results:
        assert each["ranks"] == one["ranks"]
        assert each["history"] == one["history"]
        assert each["weights"].keys() == one["weights"].keys()
        for name, tensor in one["weights"].items():
            assert torch.equal(each["weights"][name], results[0]["weights"][name])
            assert each["weights"][name].shape == tensor.shape, name
            assert torch.allclose(each["weights"][name], tensor, rtol=0, atol=within), name
    assert sum(one["ranks"].values()) == 2 * job.config["target_rank"]  # type: ignore[operator]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: ", ".join(map(str, cell)))
def test_two_processes_allocate_as_one(
    trained: dict[tuple[str, str, int], list[dict[str, Any]]], cell: tuple[str, str, int], tmp_path: Path
) -> None:
    """With accumulation and clipping, also after a stop, a save and a load: masks, history, and weights to 1e-12.

    All but one is in float64. The saved file gives one process the same outputs.
    """
    engine, config, stop = cell
    job = Job(engine, "adalora", WITH_FLOAT32[config], stop=stop)
    assert_like_one(job, trained[cell], tmp_path)
    first = trained[cell][0]
    with torch.no_grad():
        loaded = tunerkit.load(together.net().to(job.dtype), first["file"])(together.inputs().to(job.dtype))
    assert torch.allclose(loaded, first["output"], rtol=0, atol=1e-12 if job.dtype is torch.float64 else 1e-6)


def test_masked_triplets_leave_memory_where_adapters_are_whole(
    trained: dict[tuple[str, str, int], list[dict[str, Any]]],
) -> None:
    """Under DDP, whose reducer is built anew, too. With sharded adapters shapes stay, which a warning says."""
    for engine in together.ENGINES:
        first = trained[engine, "8 to 2", 0][0]
        sizes = {first["weights"][f"{path}.adapter.lam"].numel() for path in ("0", "2")}
        shrunk = sizes == set(first["ranks"].values())
        assert shrunk == (engine not in KEEPS_SHAPES)
        assert any("stay in memory" in text for text in first["warnings"]) == (engine in KEEPS_SHAPES)


def test_collectives_of_an_allocation_are_those_of_the_page(
    trained: dict[tuple[str, str, int], list[dict[str, Any]]],
) -> None:
    """Each allocation broadcasts the scores, one number a triplet; the SVD then sends the weights around.

    Before weights shrink, process 0 says whether something else relies on their shapes.
    """
    for config, extra, size in (("8 to 2", 2, 8), ("6 to 4", 1, 8), (FLOAT32, 2, 4)):
        first = trained["plain", config, 0][0]
        calls, carried = first["stepping"]
        triplets = 2 * WITH_FLOAT32[config]["init_rank"]
        # Both layers, for each triplet in memory: a column of P, λ and a row of Q.
        weights = WITH_FLOAT32[config]["init_rank"] * ((16 + 1 + 12) + (16 + 1 + 16))
        numbers = len(first["history"]) * (triplets + (weights if extra == 2 else 0))
        assert calls["broadcast_"] == extra * len(first["history"]) + 1
        assert carried["broadcast_"] == size * (numbers + 1)
        assert first["saving"] == ({}, {})


@pytest.mark.skipif(not LONG, reason="four processes take a minute; TUNERKIT_LONG=1 runs them")
def test_four_processes_allocate_as_one(tmp_path: Path) -> None:
    """Rows are spread over four processes, and parameters of 6 rows over four shards."""
    jobs = [Job(engine, "adalora", config, stop=5) for engine in together.ENGINES for config in CONFIGS.values()]
    for job, results in zip(jobs, together.together(jobs, tmp_path / "jobs", 4), strict=True):
        assert_like_one(job, results, tmp_path)
