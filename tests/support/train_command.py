"""Calls of the command ``tunerkit``, and of runs of ``tunerkit train`` that are interrupted or killed at a step."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.support import machines
from tests.support.tiny_classifier import WORDS, save_tiny_classifier
from tests.support.two_processes import PRELOADED
from tunerkit_cli.app import build
from tunerkit_cli.running import run as _run  # noqa: F401  # a server that has it imported forks in milliseconds
from tunerkit_cli.watching import callback
from tunerkit_cli.watching.callback import Watching
from tunerkit_testing.registering import registered

machines.believe_()  # in forks of the server too, which see no conftest.py

# The ends of the names in a log entry that depend on when a call of the trainer began.
_OF_A_CALL = ("_runtime", "_per_second", "num_tokens")
Plugins = Sequence[Callable[[], object]]


def command(*arguments: object, typed: str | None = None) -> Any:
    """Call ``tunerkit`` in this process with ``typed`` as input."""
    return CliRunner().invoke(build(), [str(argument) for argument in arguments], input=typed)


def succeeded(*arguments: object, typed: str | None = None) -> Any:
    """Call ``tunerkit``, which must succeed; the arguments are those of `command`."""
    done = command(*arguments, typed=typed)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done


def write_rows(path: Path, count: int = 40) -> Path:
    """Write texts whose class is their first word, as csv; each text has 2 to 9 words."""
    rng = random.Random(0)
    texts = [" ".join([word, *rng.choices(WORDS[2:], k=rng.randint(1, 8))]) for word in WORDS[:2] * (count // 2)]
    path.write_text("text,label\n" + "".join(f"{text},{text.split()[0]}\n" for text in texts), encoding="utf-8")
    return path


def arguments_of(folder: Path, method: str, config: str) -> list[str]:
    """The arguments, but ``--out``, of a run of 24 steps on 32 rows in ``folder``."""
    if not (folder / "tiny").exists():
        save_tiny_classifier(folder / "tiny")
        write_rows(folder / "data.csv")
    return [
        *("train", "--method", method, "--config", config, "--seed", "3"),
        *("--model", str(folder / "tiny"), "--data", str(folder / "data.csv")),
        *("--epochs", "3", "--batch-size", "4", "--max-length", "8", "--lr", "0.01"),
    ]


@contextmanager
def signalled(step: int, number: signal.Signals, times: int = 1) -> Iterator[None]:
    """Inside the block, the process sends itself a signal at the end of a step of training."""
    original = Watching.on_step_end

    def send(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        for _ in range(times if state.global_step == step else 0):
            os.kill(os.getpid(), number)
        return original(self, args, state, control, **kwargs)

    with mock.patch.object(Watching, "on_step_end", send):
        yield


@contextmanager
def collapsing(step: int, *, by: float = 100, times: int = 1) -> Iterator[None]:
    """Inside the block, the learning rate of a run jumps after a step, the first ``times`` that it is taken."""
    original, left = Watching.on_step_end, [times]

    def jump(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step and left[0] > 0:
            left[0] -= 1
            kwargs["lr_scheduler"].base_lrs = [by * rate for rate in kwargs["lr_scheduler"].base_lrs]
        return original(self, args, state, control, **kwargs)

    with mock.patch.object(Watching, "on_step_end", jump):
        yield


def in_process(function: Callable[..., object], *arguments: object) -> int:
    """Call a function in a new process that has only imported this module; return its exit code."""
    context = multiprocessing.get_context("forkserver")
    # There is one server in a process, and the first who uses it decides what its forks need not import again.
    context.set_forkserver_preload([*PRELOADED, __name__])
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def killed(arguments: Sequence[object], plugins: Plugins, step: int) -> None:
    """Run the command with a checkpoint at each tenth, and kill its process (kill -9) at the end of a step."""
    torch.set_num_threads(1)
    spaced = mock.patch.object(callback, "SPACING", 0.0)
    with registered(*(plugin() for plugin in plugins)), signalled(step, signal.SIGKILL), spaced:
        command(*arguments)


def check_resumed_after_ctrl_c(arguments: Sequence[object], whole: Path, out: Path, at: Sequence[int]) -> None:
    """Interrupted at each of some steps and resumed, a run ends as the uninterrupted one in ``whole``."""
    for number, step in enumerate(at):
        with signalled(step, signal.SIGINT):
            done = command(*arguments, "--out", out, *(["--resume"] if number else []))
        assert done.exit_code == 130, done.output
        assert done.stderr == f"tunerkit: interrupted; go on with: tunerkit train --out {out} --resume\n"
        assert not (out / "run.json").exists()
    succeeded("train", "--out", out, "--resume")
    assert_same_end(whole, out)


def check_resumed_after_kill(
    arguments: Sequence[object], plugins: Plugins, whole: Path, out: Path, at: Sequence[int]
) -> None:
    """The same with ``kill -9``; steps since the last checkpoint are repeated."""
    for number, step in enumerate(at):
        resume = ["--resume"] if number else []
        assert in_process(killed, [*arguments, "--out", str(out), *resume], plugins, step) == -signal.SIGKILL
        assert not (out / "run.json").exists()
    succeeded("train", "--out", out, "--resume")
    assert_same_end(whole, out)


def assert_same_end(one: Path, other: Path) -> None:
    """Assert that two runs left the same weights, bit for bit, and the same record, apart from times and folders."""
    weights, others = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    assert [name for name, value in weights.items() if not torch.equal(value, others[name])] == []
    assert (one / "adapter.safetensors").read_bytes() == (other / "adapter.safetensors").read_bytes()
    records = [record_of(folder) for folder in (one, other)]
    for record in records:
        del record["seconds"], record["recipe"]["out"]
        record.pop("savings", None)  # the reasons say how much memory is free
        record.pop("memory", None)  # which is estimated
        record["logs"] = [
            {name: value for name, value in entry.items() if not name.endswith(_OF_A_CALL)} for entry in record["logs"]
        ]
    for entry, other_entry in zip(records[0].pop("logs"), records[1].pop("logs"), strict=True):
        assert entry == other_entry, f"{entry}\n{other_entry}"
    different = [name for name in {*records[0], *records[1]} if records[0].get(name) != records[1].get(name)]
    assert different == []


def record_of(folder: Path) -> Any:
    """The record of a run."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))
