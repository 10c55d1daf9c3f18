"""``tunerkit train`` in two processes that torchrun starts, beside one process with batches of twice the size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_classifier import save_tiny_classifier
from tests.support.tiny_models import save_tiny_llama
from tests.support.train_command import command, record_of, succeeded, write_rows
from tunerkit_cli.machine import processes

for _name in ("lora", "adalora", "distributed"):
    pytest.importorskip(f"tunerkit_{_name}", reason=f"two processes train LoRA and AdaLoRA with tunerkit-{_name}")
pytest.importorskip("trl", reason="the task causal-lm needs the extra [lm]")
pytest.importorskip("sentence_transformers", reason="the task embedding needs the extra [embedding]")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

# By the names of model and data: the method.
METHODS = {"lora": "lora", "adalora": "adalora", "embedding": "lora"}
CONFIGS = {"lora": "{rank: 3}", "adalora": "{init_rank: 6, target_rank: 2, delta_t: 2}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models without dropout, which each process draws, and their rows: of classes, answers and pairs."""
    folder = tmp_path_factory.mktemp("torchrun")
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name in ("lora", "embedding"):
        file = save_tiny_classifier(folder / name) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **none}))
    write_rows(folder / "lora.csv")
    save_tiny_llama(folder / "adalora")
    texts = [line.partition(",")[0].partition(" ") for line in (folder / "lora.csv").read_text().splitlines()[1:]]
    for name, head in (("adalora", "prompt,completion"), ("embedding", "anchor,positive")):
        (folder / f"{name}.csv").write_text(f"{head}\n" + "".join(f"{a},{b}\n" for a, _, b in texts))
    return folder


def call(folder: Path, name: str, batch: int, out: str, *more: str) -> list[str]:
    """The arguments of a run of 8 steps on 32 rows; ``batch`` is that of one process."""
    method = METHODS[name]
    return [
        *("train", "--method", method, "--config", CONFIGS[method], "--seed", "3", "--precision", "fp32"),
        *("--model", str(folder / name), "--data", str(folder / f"{name}.csv"), "--out", str(folder / out)),
        *("--epochs", "2", "--batch-size", str(batch), "--lr", "0.001", "--set", "save_steps=3", *more),
    ]


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[list[dict[str, Any]]]:
    """By process, what each command of one launch printed, and its exit code."""
    runs = [call(folder, name, 4, f"{name}-2") for name in METHODS]
    stopped = call(folder, "adalora", 4, "stopped", "--stop")
    refused = call(folder, "lora", 4, "lora-2")
    runs += [stopped, ["train", "--out", str(folder / "stopped"), "--resume"], [*refused, "--overwrite"]]
    (folder / "commands.json").write_text(json.dumps(runs))
    root = Path(__file__).parents[3]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["-m", "plugins.cli.tests.torchrun_runs", str(folder / "commands.json")]
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"commands.{rank}").read_text()) for rank in (0, 1)]


def test_the_first_process_alone_prints(printed: list[list[dict[str, Any]]], folder: Path) -> None:
    """Ctrl-C in one process stops all at the same step, and the run is resumed."""
    first, second = printed
    assert [each["code"] for each in first] == [each["code"] for each in second] == [0, 0, 0, 130, 0, 0], printed
    assert {each["printed"] for each in second} == {""}
    assert "8 steps, 2 epochs, batches of 4 in each of 2 processes" in first[0]["printed"]
    assert f"go on with: tunerkit train --out {folder / 'stopped'} --resume" in first[3]["printed"]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_with_batches_of_twice_the_size(
    name: str, printed: list[list[dict[str, Any]]], folder: Path
) -> None:
    """Each step sees the same rows, so weights and losses are equal to 1e-5; ranks and allocations are the same."""
    succeeded(*call(folder, name, 8, f"{name}-1"))
    one = record_of(folder / f"{name}-1")
    wanted = load_file(folder / f"{name}-1" / "adapter.safetensors")
    for out in [f"{name}-2", *(["stopped"] if name == "adalora" else [])]:
        found, record = load_file(folder / out / "adapter.safetensors"), record_of(folder / out)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
        losses, expected = ([entry["loss"] for entry in each["logs"] if "loss" in entry] for each in (record, one))
        assert losses == pytest.approx(expected, abs=1e-5)
        assert record["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
        for key in ("ranks", "history", "budget"):
            assert record.get(key) == one.get(key)
        named = {path.name for path in (folder / f"{name}-1").iterdir()}
        assert {path.name for path in (folder / out).iterdir()} == named


def test_one_of_several_processes_that_fail_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failure counts: by it, the other processes lose their connections."""
    distributed: Any = torch.distributed  # torch does not list what it exports
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(processes, "_GRACE", 0)
    given = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert processes.reports_error()
    monkeypatch.setenv("RANK", "0")
    assert not processes.reports_error()


def test_processes_that_cannot_find_each_other_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = command(*call(folder, "lora", 4, "apart"))
    assert done.exit_code == 2
    assert "WORLD_SIZE is 2, and RANK is not set" in done.stderr
    assert not (folder / "apart").exists()
