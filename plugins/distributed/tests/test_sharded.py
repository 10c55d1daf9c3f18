import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plugins.distributed.tests import barrier_runs, ending_runs, sharded_runs
from tests.support import two_processes
from tunerkit_distributed.shards import Cut, joined, longest, packed

pytest.importorskip("tunerkit_adalora", reason="the engine is tried with AdaLoRA")
pytest.importorskip("tunerkit_lora", reason="the engine is tried with LoRA")
LONG = bool(os.environ.get("TUNERKIT_LONG"))


def skip_without_gloo() -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")


def spawn(worker: Callable[..., None], folder: Path, processes: int) -> list[dict[str, Any]]:
    skip_without_gloo()
    two_processes.spawn(worker, (processes, str(folder)), processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(6,), (5, 3), (1, 4), (0, 4), (4, 6, 2)])
def test_whole_tensors_are_their_parts_put_together(shape: tuple[int, ...], processes: int) -> None:
    """Parts are those of `torch.chunk`, the last ones perhaps empty, and putting them together restores the tensors."""
    wholes = [torch.randn(shape), torch.randn(3, 2)]
    cuts = [Cut(shape, dim, processes) for dim in range(len(shape))] + [Cut((3, 2), 0, processes)]
    tensors = [wholes[0]] * len(shape) + [wholes[1]]
    vectors = []
    for process in range(processes):
        parts = [cut.part(tensor, process) for cut, tensor in zip(cuts, tensors, strict=True)]
        assert [part.shape for part in parts] == [cut.part_shape(process) for cut in cuts]
        for part, tensor, cut in zip(parts, tensors, cuts, strict=True):
            chunks = tensor.chunk(processes, cut.dim)
            assert process >= len(chunks) or torch.equal(part, chunks[process])
        vectors.append(packed(parts, longest(cuts)))
    for whole, tensor in zip(joined(torch.stack(vectors), cuts), tensors, strict=True):
        assert torch.equal(whole, tensor)


@pytest.mark.skipif(not LONG, reason="TUNERKIT_LONG: AdaLoRA's own tests train with sharded adapters too")
@pytest.mark.parametrize("processes", [2, 4])
def test_training_with_sharded_adapters_is_that_of_one_process(processes: int, tmp_path: Path) -> None:
    """With accumulation and clipping: the same masks and the same history in all processes, and the same weights."""
    found = spawn(sharded_runs.train_sharded, tmp_path, processes)
    for method in sharded_runs.METHODS:
        expected = sharded_runs.alone(method, processes)
        for each in (run[method] for run in found):
            assert each["history"] == expected["history"]
            masks = zip(each["masks"], expected["masks"], strict=True)
            assert all(torch.equal(here, there) for here, there in masks)
            assert sharded_runs.are_close(each["weights"], expected["weights"]), method


def test_parameters_are_whole_inside_a_block_and_shards_outside_of_it(tmp_path: Path) -> None:
    """Also where processes hold parts of unlike sizes, or nothing, or FSDP2 left its root whole; and after an error."""
    for answers in spawn(barrier_runs.look_inside, tmp_path, 2):
        exchanges(answers.pop("collectives"))
        told(answers.pop("apart"))
        refused = ("mixed", "resized", "other seeds", "no seed", "no seed, another base")
        texts = {name: str(answers.pop(name)) for name in refused}
        assert answers
        assert all(answer is True for answer in answers.values()), answers
        assert texts["mixed"].startswith("StepError: FSDP2 has sharded only some of the adapter's 6 parameters")
        assert texts["resized"].startswith("StepError: a parameter of shape (5, 3) has become one of (2, 3)")
        assert texts["other seeds"].startswith("StepError: the processes of this training did not wrap alike")
        assert "seed: 0 in process 0; 1 in process 1" in texts["other seeds"]
        assert texts["no seed"] == ""
        assert "wrapped without a seed" in texts["no seed, another base"]


@pytest.mark.skipif(not ending_runs.TASKS.is_dir(), reason="this system does not list a process's threads in /proc")
@pytest.mark.parametrize("leaves", [True, False])
def test_threads_for_barriers_end_before_the_interpreter(leaves: bool, tmp_path: Path) -> None:
    """Also if the script has destroyed its process groups, and still has a barrier of one."""
    skip_without_gloo()
    two_processes.spawn(ending_runs.end, (str(tmp_path), leaves), afresh=True)
    for rank in range(2):
        before, with_default, with_host, at_end = json.loads((tmp_path / str(rank)).read_text(encoding="utf-8"))
        assert before < with_default < with_host
        assert at_end <= (before if leaves else with_default)


def exchanges(counted: dict[str, Any]) -> None:
    """What a step, an allocation and a checkpoint exchange, as docs/evidence/scaling-grids.md says."""
    assert all(step == ({"allreduce_": 1}, {"allreduce_": 28}) for step in counted["lora"]["steps"])
    for method, found in counted.items():
        part, triplets, values = (8 * found[name] for name in ("longest", "triplets", "values"))  # in float64
        flags = 4 * found["parameters"]
        barriers = 2 * sharded_runs.ACCUMULATED  # at each forward and each backward
        assert found["barriers"] == (barriers, barriers * 28)
        averaging = 1 if method == "lora" else 2  # hooks of LoRA see whole weights; AdaLoRA has two averages of each
        assert found["states"][0] == ({"allgather_": 1}, {"allgather_": averaging * part})
        assert found["states"][-1] == (found["states"][0] if method == "lora" else ({}, {}))
        for number, (calls, sent) in enumerate(found["steps"] if method != "lora" else (), 1):
            expected, carried = Counter(allreduce_=1), Counter(allreduce_=28)  # a barrier
            if number < found["allocations"][-1]:  # which gradients are finite
                expected += Counter(allreduce_=1)
                carried += Counter(allreduce_=flags)
            if number in found["allocations"]:  # partial scores, and λ
                expected += Counter(allreduce_=1, broadcast_=1)
                carried += Counter(allreduce_=2 * triplets, broadcast_=triplets)
            if number in found["allocations"] and method == "adalora 8 -> 2":  # its SVD
                expected += Counter(allgather_=1, broadcast_=1)
                carried += Counter(allgather_=part, broadcast_=values)
            if method == "adalora 6 -> 4":  # with γ
                expected += Counter(allgather_=2)
                carried += Counter(allgather_=2 * part + 8 * found["parameters"])
            assert calls == expected, (method, number)
            assert sent == carried, (method, number)


def told(errors: dict[str, str]) -> None:
    """A process that skips a backward, or has one more, is named by one error, which each process raises.

    Without it FSDP2 would wait for ever: the forward of one more batch is an exchange as well.
    """
    places = {
        "skips_backward": ("step 2, backward 1", "step 2, and it steps without a backward"),
        "has_one_more": ("step 2, and it steps after backward 1", "step 2, forward 2"),
    }
    for case, error in errors.items():
        first, second = places[case.split()[1]]
        assert f"process 0 is at {first} (adapters: default); process 1 is at {second} (" in error, case
