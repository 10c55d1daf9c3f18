"""A Trainer that is killed while it writes a checkpoint resumes to the same end, bit for bit, or says why not."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

import tunerkit
from tests.faults.adapters import config_of, kinds, wrong_error
from tests.faults.forks import Child, asked, failures
from tests.support.trainer_toys import Regression, RegressionRows, arguments
from tunerkit_testing.resuming import assert_same

STEPS = 8  # with a checkpoint after every second one; the third is interrupted


class Noisy(Regression):
    """Dropout: its random numbers are part of what a checkpoint has to restore."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super().forward(nn.functional.dropout(x, 0.3, self.training), labels)
        return found


def train(kind: str, place: Path, watch: Callable[[], object] | None = None, *, resume: bool = False) -> Any:
    """Train; return weights, optimizer state and step. ``watch`` is called at each call of the third checkpoint."""
    config = {**config_of(kind), "targets": ["first", "second"]}
    if kind == "adalora":
        config |= {"target_rank": 1, "init_rank": 2, "t_final": 2, "delta_t": 2}
    model = tunerkit.wrap(Noisy(), kind, config, seed=0)
    chosen = arguments(
        place, max_steps=STEPS, learning_rate=0.05, save_strategy="steps", save_steps=2, remove_unused_columns=False
    )
    trainer = Trainer(model, chosen, train_dataset=RegressionRows())
    trainer.remove_callback(PrinterCallback)
    tunerkit.attach(model, trainer)
    save, saved = trainer._save_checkpoint, 0

    def watched(*given: Any, **options: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 3 and watch is not None:
            sys.setprofile(lambda *_: watch() and None)
        try:
            save(*given, **options)
        finally:
            sys.setprofile(None)

    trainer._save_checkpoint = watched  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=True if resume else None)
    assert trainer.optimizer is not None
    state = trainer.optimizer.state_dict()["state"]
    return dict(model.state_dict()), [state[key] for key in sorted(state)], trainer.state.global_step


def killed(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Kill a training at one of the calls of Python's or C's functions that write a checkpoint, and resume it."""
    used = [kind for kind in kinds() if kind != "toy-shift"]
    ends: dict[str, Any] = {}
    calls: dict[str, int] = {}
    for number in range(count):
        kind, chance = used[number % len(used)], random.Random(number)
        if kind not in ends:
            ends[kind] = train(kind, folder / f"whole-{kind}")
            calls[kind] = asked(partial(_calls_of, kind, folder / f"count-{kind}"))
        at = chance.randrange(1, calls[kind] + 1)
        place = folder / f"case-{number}"
        died = Child(partial(_killed_at, kind, place, at)).wait()
        outcome = asked(partial(_resumed, kind, place, ends[kind]))
        outcome = outcome if died == signal.SIGKILL else f"it was not killed (signal {died})"
        yield f"{kind}, killed at call {at} of {calls[kind]}", outcome


def _calls_of(kind: str, place: Path) -> int:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    train(kind, place, count)
    return calls


def _killed_at(kind: str, place: Path, at: int, _: IO[bytes]) -> None:
    left = at

    def kill() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    train(kind, place, kill)


def _resumed(kind: str, place: Path, end: Any) -> str:
    try:
        assert_same(train(kind, place, resume=any(place.glob("checkpoint-*"))), end)
    except AssertionError as difference:
        return f"training ended otherwise, without an error: {difference}"
    except Exception as error:
        return wrong_error(error)
    return ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trainings are killed in forks")
def test_killed_in_a_checkpoint_and_resumed_the_end_is_the_same() -> None:
    """Or there is an error of ours: training never resumes to another end."""
    assert failures(killed, 63 if os.environ.get("TUNERKIT_LONG") == "1" else 6) == []
