"""Adapters of which each process holds a whole copy: like one process, and errors where processes part ways."""

import os
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import distributed, nn

import tunerkit
from plugins.distributed.tests import apart
from tests.support import together, two_processes
from tests.support.toy_growing import GrowingPlugin
from tunerkit import serialization
from tunerkit.plugin import Engine
from tunerkit_distributed import torch_private
from tunerkit_testing.counting import Counting
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

LONG = os.environ.get("TUNERKIT_LONG") == "1"
TARGETS = ["0", "2"]
LOW_RANK = together.Job("alone", "toy-low-rank", {"targets": TARGETS}, steps=6)
GROWING = together.Job("alone", "toy-growing", {"targets": TARGETS, "every": 2}, steps=7)
JOBS = {
    "plain": attrs.evolve(LOW_RANK, engine="plain"),
    "plain, synchronised once a step": attrs.evolve(LOW_RANK, engine="plain", no_sync=True),
    "ddp": attrs.evolve(LOW_RANK, engine="ddp"),
    "fsdp2": attrs.evolve(LOW_RANK, engine="fsdp2"),
    "plain, growing": attrs.evolve(GROWING, engine="plain"),
    "ddp, growing, resumed": attrs.evolve(GROWING, engine="ddp", stop=3),
    "fsdp2, growing, resumed": attrs.evolve(GROWING, engine="fsdp2", stop=3),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What two processes found, by job and process."""
    plugins = (LowRankPlugin, GrowingPlugin)
    found = together.together([*JOBS.values()], tmp_path_factory.mktemp("jobs"), plugins=plugins)
    return dict(zip(JOBS, found, strict=True))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found that go wrong, by process."""
    folder = tmp_path_factory.mktemp("wrong")
    two_processes.spawn(apart.go_wrong, (str(folder),))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_train_as_one_on_the_same_batches(
    trained: dict[str, list[dict[str, Any]]], name: str, tmp_path: Path
) -> None:
    """With accumulation and clipping: the same ranks and history, weights within 1e-6, and alike in both processes."""
    job = attrs.evolve(JOBS[name], engine="alone", no_sync=False)
    with registered(LowRankPlugin(), GrowingPlugin()):
        one = together.train(job, tmp_path)
        first, second = trained[name]
        assert first["ranks"] == second["ranks"] == one["ranks"]
        assert first["history"] == second["history"] == one["history"]
        for key, tensor in one["weights"].items():
            assert torch.equal(first["weights"][key], second["weights"][key])
            assert torch.allclose(first["weights"][key], tensor, rtol=0, atol=1e-6)
        assert torch.equal(tunerkit.load(together.net(), first["file"])(together.inputs()), first["output"])
    assert first["file"] == second["file"]
    assert first["file"].exists()


def test_growing_really_grew(trained: dict[str, list[dict[str, Any]]]) -> None:
    """It would not show if the toy had stayed as it was."""
    for name in ("plain, growing", "ddp, growing, resumed"):
        assert set(trained[name][0]["ranks"].values()) == {4}


@pytest.mark.parametrize(("name", "reduced"), [("plain", 12), ("plain, synchronised once a step", 6), ("ddp", 12)])
def test_one_all_reduce_for_each_backward_with_the_bytes_of_the_page(
    trained: dict[str, list[dict[str, Any]]], name: str, reduced: int
) -> None:
    """Per averaged backward: a number for each trained value and each parameter, and seven for the place.

    Two batches are accumulated in each of six steps. DDP sends the values alone, and before it the processes meet.
    Saving needs no collective.
    """
    result = trained[name][0]
    calls, carried = result["stepping"]
    parameters, values = len(result["weights"]), sum(tensor.numel() for tensor in result["weights"].values())
    if name == "ddp":
        assert calls["allreduce_"] == 2 * reduced
        assert carried["allreduce_"] == reduced * (4 * values + 28)
    else:
        assert calls["allreduce_"] == reduced
        assert carried == {"allreduce_": reduced * 4 * (values + parameters + 7)}
    assert result["saving"] == ({}, {})


def test_one_process_says_that_it_averages_and_only_where_it_does(trained: dict[str, list[dict[str, Any]]]) -> None:
    """Process 0 warns once, and not under DDP, which averages by itself."""
    told = {
        name: [sum("data_parallel=False" in w for w in each["warnings"]) for each in trained[name]] for name in JOBS
    }
    assert told["plain"] == told["fsdp2"] == [1, 0]
    assert told["ddp"] == [0, 0]


def test_merging_is_right(trained: dict[str, list[dict[str, Any]]]) -> None:
    """A merged model computes the same, and unmerging restores every bit, also where FSDP2 has sharded the base."""
    for name in ("plain", "ddp", "fsdp2"):
        for result in trained[name]:
            merged, restored = result["merge"]
            assert torch.allclose(merged, result["output"], atol=1e-6)
            assert restored


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another_seed", ["did not wrap alike", "seed: 0 in process 0; 1 in process 1"]),
        ("other_settings", ["setting targets: ['0'] in process 0; ['0', '2'] in process 1"]),
        (
            "skipped_backward",
            ["process 0 is at step 2, backward 1 (adapters: default); process 1 is at step 2, and it steps without"],
        ),
        (
            "extra_backward",
            ["process 0 is at step 3, backward 1 (adapters: default); process 1 is at step 2, backward 3"],
        ),
        (
            "trains_base",
            ["2 trained parameters belong to no attached adapter (shapes: (4, 16), (4,))", "train_modules"],
        ),
        ("trained_later", ["2 trained parameters belong to no attached adapter"]),
        ("other_rate", ["optimizer: SGD", "'lr': 0.1", "'lr': 0.2"]),
        ("lbfgs", ["LBFGS chooses its steps by the loss"]),
        ("late_skip", ["process 0 is at step 3, backward 2 (adapters: default); process 1 is at step 4, backward 1"]),
    ],
)
def test_processes_that_part_ways_are_told_in_each(wrong: list[dict[str, Any]], case: str, words: list[str]) -> None:
    """One error, the same in both processes, and no process waits for the other."""
    assert wrong[0][case] == wrong[1][case]
    assert wrong[0][case].startswith("StepError: ")
    assert all(word in wrong[0][case] for word in words), wrong[0][case]


def test_without_a_seed_the_start_is_that_of_process_0(wrong: list[dict[str, Any]]) -> None:
    """The processes drew different numbers."""
    assert all(torch.equal(one, other) for one, other in zip(wrong[0]["no_seed"], wrong[1]["no_seed"], strict=True))


def test_a_parameter_counts_where_any_process_used_it(wrong: list[dict[str, Any]]) -> None:
    """Its gradient is averaged over all processes, and stays None where none used it."""
    one, other = (each["unused"] for each in wrong)
    used = [grad is not None for grad in one]
    assert used == [grad is not None for grad in other]
    assert used == [True, True, True, True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


def test_a_parameter_that_one_process_froze_is_trained_by_the_others(wrong: list[dict[str, Any]]) -> None:
    """Both send as many numbers, whatever they train, so neither waits for more."""
    assert [each["frozen_by_one"] for each in wrong] == [True, False]


def test_an_adapter_goes_on_when_the_first_is_deleted(wrong: list[dict[str, Any]]) -> None:
    """The engine is told of steps by one that is still attached, and averages what was put off."""
    one, other = (each["first_deleted"] for each in wrong)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_forward_outside_of_ddp_changes_nothing(wrong: list[dict[str, Any]]) -> None:
    """As for DPO's reference: DDP still averages, alone."""
    found, other = (each["evaluated_outside"] for each in wrong)
    assert found == other
    assert found[0] == pytest.approx(found[1]) == pytest.approx(found[2])


def test_a_later_save_is_waited_for(wrong: list[dict[str, Any]]) -> None:
    """A file that process 0 wrote before, at the same place, is not taken for it."""
    assert [each["finished_between"] for each in wrong] == [True, True]


def test_independent_trainings_stay_apart(wrong: list[dict[str, Any]]) -> None:
    """With data_parallel=False other seeds and numbers of steps are fine, and each process writes its own file."""
    (one, one_saved), (other, other_saved) = (each["alone"] for each in wrong)
    assert one_saved
    assert other_saved
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_process_0_could_not_write_fails_in_all(wrong: list[dict[str, Any]]) -> None:
    """Nobody waits for a file that will not come."""
    assert wrong[0]["failed_save"].startswith("FileError: cannot write")
    assert wrong[1]["failed_save"].startswith("FileError: process 0 could not write")


def test_process_0_may_save_alone(wrong: list[dict[str, Any]]) -> None:
    """It waits for nobody; a later save in all processes is not confused by it."""
    assert [each["saved_by_one"] for each in wrong] == [True, True]


def test_process_0_may_read_the_optimizer_alone(wrong: list[dict[str, Any]]) -> None:
    """The distributed checkpoint of torch steps an optimizer without state: no process waits, and none counts it."""
    (steps, one), (others, other) = (each["asked_by_one"] for each in wrong)
    assert steps == others == 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_under_ddp_and_fsdp2_too_both_are_told_who_skips_a_backward(wrong: list[dict[str, Any]]) -> None:
    """Or who has one more, also one that DDP does not average: the engine would wait for ever, or go on wrongly."""
    places = {
        "ddp_skips": ("step 2, backward 1", "step 2, and it steps without a backward"),
        "ddp_has_one_more": ("step 3, backward 1", "step 2, backward 2"),
        "fsdp2_skips": ("step 2, backward 1", "step 2, and it steps without a backward"),
        "fsdp2_has_one_more": ("step 3, forward 1", "step 2, forward 2"),
    }
    for case, (first, second) in places.items():
        assert wrong[0][case] == wrong[1][case]
        assert f"process 0 is at {first} (adapters: default); process 1 is at {second} (" in wrong[0][case]
    for case, first, second in (
        ("ddp_accumulates", "step 2, backward 2", "step 2, backward 3"),
        ("ddp_alternates", "step 3, backward 2", "step 4, backward 1"),
    ):
        assert wrong[0][case][1] == wrong[1][case][1]
        assert f"process 0 is at {first} (adapters: default); process 1 is at {second} (" in wrong[0][case][1]


def test_what_one_process_does_beside_ddp_disturbs_nobody(wrong: list[dict[str, Any]]) -> None:
    """A backward of the model inside, and batches that use other adapters: the processes go on alike."""
    for case in ("ddp_local", "ddp_with_a_later_adapter"):
        assert all(torch.equal(a, b) for a, b in zip(*(each[case] for each in wrong), strict=True)), wrong[0][case]


def test_what_ddp_would_mix_up_or_wait_for_is_told(wrong: list[dict[str, Any]]) -> None:
    """Another model with an adapter of that name, a forward of one process that sends buffers, a DDP that is gone."""
    for each in wrong:
        assert "backward 1 (adapters: default) of training" in each["ddp_twins"]
        assert each["ddp_with_buffers_runs_out"].startswith("StepError: ")
        assert "its DistributedDataParallel is gone" in each["ddp_is_gone"]


def test_one_barrier_for_each_backward_that_ddp_averages(wrong: list[dict[str, Any]]) -> None:
    """However many adapters, models and optimizers take part, and none where gradients are only added up."""
    for each in wrong:
        assert each["ddp_accumulates"][0] == 1
        assert each["ddp_alternates"][0] == 4
        assert each["ddp_two_adapters"] == 1


def test_under_ddp_a_process_waits_for_nobody_where_ddp_would_not(wrong: list[dict[str, Any]]) -> None:
    """To evaluate, to take gradients of its own, to go on when it is detached, and inside ``join``."""
    assert [each["ddp_one_looks"] for each in wrong] == [each["ddp_steps_idly"] for each in wrong] == [2, 2]
    one, other = (each["ddp_joins"] for each in wrong)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


LOST = pytest.param(
    True, "lost another one while it waited", marks=pytest.mark.skipif(not LONG, reason="TUNERKIT_LONG")
)


@pytest.mark.parametrize(("lost", "words"), [(False, "process 1 for process 0 to write"), LOST])
def test_a_process_that_ends_early_is_not_waited_for(lost: bool, words: str, tmp_path: Path) -> None:
    """It goes on to save, or is gone: the other one is told what it waited for, long before any time limit."""
    two_processes.spawn(apart.end_apart, (str(tmp_path), lost))
    answer = (tmp_path / "0.txt").read_text()
    assert answer.startswith("StepError: process 0")
    assert "the gradients of step 3" in answer
    assert words in answer
    if not lost:
        assert "the gradients of step 3" in (tmp_path / "1.txt").read_text()


def test_a_killed_process_costs_nothing_since_the_last_checkpoint(tmp_path: Path) -> None:
    """Both are started again, and end with the weights of a training that was never killed, bit for bit."""
    with pytest.raises(Exception, match="process 1 terminated with exit code 9"):
        two_processes.spawn(apart.be_killed, (str(tmp_path),))
    assert (tmp_path / "checkpoint" / "last").read_text() == "4"
    (tmp_path / "store").unlink()
    two_processes.spawn(apart.be_restarted, (str(tmp_path),))
    ends = [end for rank in range(2) for end in torch.load(tmp_path / f"{rank}.pt")]
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))


def test_one_process_has_the_default_engine_and_may_not_ask_for_another() -> None:
    """Without a process group nothing changes, and data_parallel=True says what is missing."""
    with registered(LowRankPlugin()):
        model = tunerkit.wrap(together.net(), "toy-low-rank", {"targets": TARGETS})
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for given, words in ((True, "in no process group"), ("yes", "expected True, False or None, got 'yes'")):
            with pytest.raises(tunerkit.errors.StepError, match=words):
                tunerkit.attach(model, optimizer, data_parallel=given)  # type: ignore[arg-type]
        tunerkit.attach(model, optimizer)
        assert type(tunerkit.tuner(model).engine) is Engine
        with tunerkit.no_sync(model), Counting() as counted:
            pass
    assert counted.count == 0


@pytest.mark.parametrize(("size", "data_parallel", "told"), [("2", None, 1), ("2", False, 0), ("1", None, 0)])
def test_processes_that_formed_no_group_are_told(
    size: str, data_parallel: bool | None, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher has started several, and each would train alone and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", size)
    with registered(LowRankPlugin()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tunerkit.wrap(together.net(), "toy-low-rank", {"targets": TARGETS})
        tunerkit.attach(model, together.adam(model), data_parallel=data_parallel)
    assert sum("is in no process group" in str(each.message) for each in caught) == told


def test_adapters_of_a_sharded_base_are_saved_with_the_fingerprint_of_before(trained: dict[str, Any]) -> None:
    """The file of a training under FSDP2 names the same base as that of one process."""
    plain, sharded = (serialization.read(trained[name][0]["file"], content="adapter")[2] for name in ("plain", "fsdp2"))
    assert plain.base == sharded.base
    assert len(plain.base) == 6


def test_a_group_of_one_process_trains_as_one_process() -> None:
    """A script for several GPUs runs on one too: data_parallel=True asks for a group, not for others in it."""
    with registered(LowRankPlugin()):
        model = tunerkit.wrap(together.net(), "toy-low-rank", {"targets": TARGETS})
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tunerkit.attach(model, optimizer, data_parallel=True)
            model(together.rows(0)[0]).sum().backward()
            optimizer.step()
        finally:
            distributed.destroy_process_group()
        assert tunerkit.tuner(model).steps == 1


def test_the_ddp_around_a_model_is_found() -> None:
    """A model does not know it, and it may be around a module around the model."""
    model = nn.Sequential(together.net())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        assert torch_private.ddp_around(model[0]) is None
        parallel = nn.parallel.DistributedDataParallel(model)
        assert torch_private.ddp_around(model[0]) is parallel
        assert torch_private.ddp_around(together.net()) is None
    finally:
        distributed.destroy_process_group()
