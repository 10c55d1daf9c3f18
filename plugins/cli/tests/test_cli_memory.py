"""The memory of a run: what the command plans, says and records, and how a run ends that has too little."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("trl", reason="it trains language models")
from transformers import Trainer

from tests.support.tiny_models import save_tiny_llama
from tests.support.train_command import command, record_of, succeeded
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

PARTS = ("base", "adapter", "gradients", "optimizer", "averages", "activations", "overhead")


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(LowRankPlugin()):
        yield


@pytest.fixture
def call(tmp_path: Path) -> list[object]:
    """A run of ten steps of a tiny language model."""
    model, data = save_tiny_llama(tmp_path / "llama"), tmp_path / "data.jsonl"
    rows = [{"text": f"the film{' plot' * (7 * number % 8)}"} for number in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ("--method", "toy-low-rank", "--config", "{rank: 2}", "--batch-size", "4", "--set", "samples=0")
    return ["train", "--model", model, "--data", data, "--eval-data", data, "--precision", "fp32", *how]


@contextmanager
def exhausted(after: int, problem: Exception) -> Iterator[None]:
    """Inside the block, a training has no memory left after some micro-batches."""
    step, left = Trainer.training_step, [after]

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        if not left[0]:
            raise problem
        left[0] -= 1
        return step(self, *arguments, **options)

    with mock.patch.object(Trainer, "training_step", run):
        yield


def of_a_cpu() -> RuntimeError:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**55, dtype=torch.uint8)
    return found.value


def test_memory_is_said_before_training_and_recorded(call: list[object], tmp_path: Path) -> None:
    """One line; in a dry run a table too, whose total is that of its parts; and bytes in ``run.json``."""
    said = succeeded(*call, "--out", tmp_path / "out", "--dry-run").output.splitlines()
    assert sum(line.startswith("memory: about ") and "activations" in line for line in said) == 1
    table = [line.split()[0] for line in said[-10:-2]]
    assert table == [*PARTS, "total"]
    assert said[-2].startswith("would save about: gradient checkpointing ")
    succeeded(*call, "--out", tmp_path / "out")
    memory = record_of(tmp_path / "out")["memory"]
    assert memory["total"] == sum(memory[name] for name in PARTS)
    assert memory["base"] > memory["adapter"] > 0


def test_a_run_that_runs_out_of_memory_goes_on_with_less(call: list[object], tmp_path: Path) -> None:
    """It ends in one sentence with the command that goes on, which ends with the adapter of a run with enough."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    call = [*call, "--set", "save_steps=3"]
    succeeded(*call, "--out", whole)
    with exhausted(6, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")):
        done = command(*call, "--out", out)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("tunerkit: out of memory: the training takes about ")
    assert "would save about: gradient checkpointing " in done.stderr
    again = f"tunerkit train --out {out} --resume --set gradient_checkpointing=true\n"
    assert done.stderr.endswith(f"; go on with: {again}")
    said = succeeded(*again.split()[1:]).output
    assert "gradient checkpointing: on" in said
    assert (out / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("problem", [of_a_cpu(), MemoryError()], ids=lambda each: type(each).__name__)
def test_without_a_step_nothing_is_written(call: list[object], tmp_path: Path, problem: Exception) -> None:
    """The keys that take less are named; so are they if the model itself does not fit."""
    ways = "train with --set gradient_checkpointing=true, a smaller --batch-size or --set quantisation=nf4\n"
    with exhausted(0, problem):
        done = command(*call, "--out", tmp_path / "out")
    assert (done.exit_code, done.stderr[-len(ways) :]) == (2, ways)
    assert not (tmp_path / "out").exists()
    with mock.patch("tunerkit_cli.preparing.session.load_pretrained", side_effect=problem):
        done = command(*call, "--out", tmp_path / "out")
    assert done.stderr == (
        f"tunerkit: out of memory: gradient checkpointing, smaller batches or a 4-bit base take less; {ways}"
    )


def test_other_errors_stay_what_they_are(call: list[object], tmp_path: Path) -> None:
    """A RuntimeError that is not of memory is still an internal error."""
    with exhausted(0, RuntimeError("shapes do not fit")):
        done = command(*call, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "out of memory" not in done.stderr
