"""AdaLoRA that stops in some processes and goes on in another number of them, with the same global batches."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from plugins.adalora.tests import handing_over
from tests.support import together
from tests.support.together import Job

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

LONG = os.environ.get("TUNERKIT_LONG") == "1"
SCHEDULE = {"targets": ["0", "2"], "t_init": 2, "t_final": 3, "delta_t": 1, "adapter_dtype": "float64"}
WITH_SVD = {**SCHEDULE, "init_rank": 8, "target_rank": 2}
TRAINS_LAMBDA = {**SCHEDULE, "init_rank": 6, "target_rank": 4, "exact_svd": False, "train_lambda": True}
# Where shapes stay, one process keeps them too: clipping counts the gradients of masked triplets.
JOBS = {
    "plain": Job("plain", "adalora", TRAINS_LAMBDA, stop=5),
    "ddp": Job("ddp", "adalora", WITH_SVD, stop=5),
    "fsdp2": Job("fsdp2", "adalora", WITH_SVD, stop=5),
    "fsdp2 sharded": Job("fsdp2 sharded", "adalora", {**WITH_SVD, "shrink": False}, stop=5),
}
ACCELERATED = attrs.evolve(JOBS["ddp"], engine="accelerate")


def alone(job: Job) -> Job:
    return attrs.evolve(job, engine="alone")


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The trainings of one process from the start to the end."""
    folder = tmp_path_factory.mktemp("never-stopped")
    return {name: together.train(attrs.evolve(alone(job), stop=0), folder) for name, job in JOBS.items()}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Where two processes left their checkpoints, and how they went on from these, and from those of one process."""
    folder = tmp_path_factory.mktemp("two")
    for number, job in enumerate(JOBS.values()):
        handing_over.begin(alone(job), folder / str(number) / "before")
    accelerated = [ACCELERATED] if find_spec("accelerate") else []
    found = together.together([*JOBS.values(), *accelerated], folder, run=handing_over.hand_over)
    return folder, dict(zip([*JOBS, *(job.engine for job in accelerated)], found, strict=True))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same ranks and history, and weights within 1e-12, in float64."""
    assert found["ranks"] == expected["ranks"]
    assert found["history"] == expected["history"]
    for name, tensor in expected["weights"].items():
        assert torch.allclose(found["weights"][name], tensor, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("name", JOBS)
def test_a_training_goes_on_in_another_number_of_processes(
    in_two: tuple[Path, dict[str, list[dict[str, Any]]]], never_stopped: dict[str, dict[str, Any]], name: str
) -> None:
    """From two to one, from one to two, and from two to two: as the training of one process that never stopped.

    The step with which torch fills in the state of a fresh optimizer, while it loads, is not counted.
    """
    folder, results = in_two
    for each in results[name]:
        assert each["here"]["steps"] == each["before"]["steps"] == 0
        assert_same(each["here"], never_stopped[name])
        assert_same(each["before"], never_stopped[name])
    here = folder / str([*JOBS].index(name)) / "here"
    assert_same(handing_over.go_on(alone(JOBS[name]), here), never_stopped[name])


def test_a_checkpoint_of_accelerate_under_ddp_is_exact(
    in_two: tuple[Path, dict[str, list[dict[str, Any]]]], never_stopped: dict[str, dict[str, Any]]
) -> None:
    """``save_state`` and ``load_state`` as they are, and with `checkpoint_adapters_`, which leaves out the base."""
    pytest.importorskip("accelerate")
    for each in in_two[1]["accelerate"]:
        for found in (each["here"], each["adapters alone"]):
            assert_same(found, never_stopped["ddp"])
        assert all(torch.equal(w, each["adapters alone"]["weights"][n]) for n, w in each["here"]["weights"].items())


@pytest.mark.skipif(not LONG, reason="four processes take a minute; TUNERKIT_LONG=1 runs them")
def test_a_training_goes_on_in_four_processes_and_from_four(
    in_two: tuple[Path, dict[str, list[dict[str, Any]]]], never_stopped: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """From two to four, from four to four, from four to two and from four to one."""
    two, four, back = in_two[0], tmp_path / "four", tmp_path / "back"
    jobs = [*JOBS.values()]
    for number in range(len(jobs)):
        shutil.copytree(two / str(number) / "here", four / str(number) / "before")
    in_four = together.together(jobs, four, 4, run=handing_over.hand_over)
    for number in range(len(jobs)):
        shutil.copytree(four / str(number) / "here", back / str(number) / "before")
    in_two_again = together.together(jobs, back, run=handing_over.hand_over)
    for number, (name, job) in enumerate(JOBS.items()):
        for each in (*in_four[number], *in_two_again[number]):
            assert_same(each["here"], never_stopped[name])
            assert_same(each["before"], never_stopped[name])
        assert_same(handing_over.go_on(alone(job), four / str(number) / "here"), never_stopped[name])
