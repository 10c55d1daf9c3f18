"""The scripts in examples/ run in two processes, as their first lines say, and write what they promise.

What torchrun would start are forks of a process that has imported the libraries, which takes a third of the time. The
launcher of accelerate is the real one, and torchrun itself in the tests of the command.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import warm_python
from tunerkit import serialization

EXAMPLES = Path(__file__).parents[3] / "examples"
pytest.importorskip("tunerkit_adalora", reason="the examples train with AdaLoRA")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

IS_LONG = os.environ.get("TUNERKIT_LONG") == "1"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# `accelerate launch --cpu` starts several processes only through MPI. Without a GPU, these run on CPUs too.
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
LONG = pytest.mark.skipif(not IS_LONG, reason="like the one before; TUNERKIT_LONG=1 runs it")


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("torchrun", TORCHRUN),
        pytest.param("fsdp2", TORCHRUN, marks=LONG),
        ("trainer", ACCELERATE),
        pytest.param("trainer", TORCHRUN, marks=LONG),
    ],
    ids=["torchrun", "fsdp2", "accelerate launch", "torchrun with a Trainer"],
)
def test_an_example_trains_in_two_processes(name: str, launcher: tuple[str, ...], tmp_path: Path) -> None:
    """One of them says so, and the file it names holds an adapter whose budget is spent; none warns."""
    absent = [each for each in _imports(name) if find_spec(each) is None]
    if absent:
        pytest.skip(f"the example needs {', '.join(absent)}")
    script = str(EXAMPLES / f"{name}.py")
    variables = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done: Any
    if launcher is TORCHRUN and sys.platform == "linux" and not IS_LONG:
        done = warm_python.run_together(tmp_path, script, processes=2, **variables)
    else:
        command, environment = [sys.executable, "-m", *launcher, script], {**os.environ, **variables}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes") == 1, done.stdout
    assert "TunerkitWarning" not in done.stderr
    file = tmp_path / f"out/{name}/adapter.safetensors"
    assert f"written to {file.relative_to(tmp_path)}" in done.stdout
    masks = [mask for key, mask in serialization.read(file, content="adapter")[1].items() if key.endswith("mask")]
    assert sum(int(mask.sum()) for mask in masks) == 2 * len(masks) > 0


def test_each_example_is_short_and_says_how_it_is_started() -> None:
    """All of them are run above."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(found) == {"torchrun", "fsdp2", "trainer"}
    for name, text in found.items():
        assert len(text.splitlines()) <= 45
        assert f"torchrun --nproc-per-node 2 examples/{name}.py" in text.splitlines()[0]


def _imports(name: str) -> list[str]:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    return ["transformers", "accelerate"] if "from transformers" in text else []
