"""Checkpoints of a run: when they are written, which ones a restart removes, and at which rate it goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, strategies as st
from rich.console import Console
from transformers import TrainerControl, TrainerState

from tunerkit.errors import FileError
from tunerkit_cli.folder import RunFolder
from tunerkit_cli.report.record import Problem, Restart
from tunerkit_cli.watching import callback
from tunerkit_cli.watching.callback import LostError, Watching, read_restarts, roll_back, slow_down_, slower


def lost(good: int) -> LostError:
    return LostError(Problem("collapse", "the loss is back", good + 9, 1e-3), good)


def run_with(folder: Path, *steps: int) -> Path:
    """The folder of a run with checkpoints, and with files of the user's beside them."""
    for name in (*(f"checkpoint-{step}" for step in steps), "checkpoint-mine"):
        (folder / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / name / "trainer_state.json").write_text("{}")
    RunFolder(folder).note([f"checkpoints/checkpoint-{step}/trainer_state.json" for step in steps])
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_later_checkpoints_go_and_the_last_good_one_stays(tmp_path: Path) -> None:
    """What is not a checkpoint stays too, and the restart is noted for --resume."""
    folder = run_with(tmp_path, 76, 114, 152)
    restart = roll_back(RunFolder(folder), lost(120), 0.004)
    assert restart == Restart("the loss is back", 129, 114, 0.002)
    assert names(folder) == {"checkpoint-76", "checkpoint-114", "checkpoint-mine", "notes.txt", "restarts.json"}
    assert read_restarts(RunFolder(folder)) == (restart,)
    assert str(restart) == "restarted from step 114 at half the learning rate, 0.002, because the loss is back"


def test_no_checkpoint_is_gone_back_to_twice(tmp_path: Path) -> None:
    """If half the rate did not help from there, it goes further back: in the end to the beginning."""
    folder = run_with(tmp_path, 76, 114)
    found = [roll_back(RunFolder(folder), lost(120), rate) for rate in (0.004, 0.002, 0.001)]
    assert [restart.from_step for restart in found] == [114, 76, 0]
    assert names(folder) == {"checkpoint-mine", "notes.txt", "restarts.json"}
    assert read_restarts(RunFolder(folder)) == tuple(found)
    assert "from the beginning" in str(found[-1])


def test_checkpoints_are_a_minute_apart_and_the_last_one_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock since the training began, or since the last one; Ctrl-C does not wait for it."""
    now, written = [0.0], []
    monkeypatch.setattr(callback, "time", SimpleNamespace(monotonic=lambda: now[0]))
    unused: Any = None
    watching = Watching(Console(quiet=True), unused, lambda steps: unused, (), may_restart=False, spaces=True)
    for step in range(11):
        state, control = TrainerState(global_step=step, max_steps=10), TrainerControl(should_save=True)
        control.should_training_stop, watching.interrupted = step == 10, step == 5
        (watching.on_step_end if step else watching.on_train_begin)(unused, state, control)
        if step and control.should_save:
            written.append(step)
            watching.on_save(unused, state, control)
        now[0] += 25
    assert written == [3, 5, 8, 10]


def test_a_run_without_restarts_has_none_and_a_damaged_note_is_an_error(tmp_path: Path) -> None:
    """The error names the file, and what to do."""
    assert read_restarts(RunFolder(tmp_path)) == ()
    folder = run_with(tmp_path)
    for text in ("", "{}", '{"restarts": [{"step": 1}]}', "[]"):
        (folder / "checkpoints" / "restarts.json").write_text(text)
        with pytest.raises(FileError, match=r"restarts\.json: is damaged .*--overwrite"):
            read_restarts(RunFolder(folder))


@given(st.lists(st.integers(-6, 9), max_size=30))
def test_a_checkpoint_is_slowed_once_for_each_restart_since_it_was_written(events: list[int]) -> None:
    """Whatever the order of checkpoints (0 and more) and restarts (below 0): the rate is that of the training now."""
    rate, step = 1.0, 0
    written: dict[int, float] = {}  # the learning rate that each checkpoint has, by its step
    restarts: list[Restart] = []
    for event in events:
        if event >= 0:
            step += 1 + event
            written[step] = rate
        else:
            step = sorted([0, *written])[max(event, -len(written) - 1)]
            written = {each: found for each, found in written.items() if each <= step}
            rate *= 0.5
            restarts.append(Restart("lost", None, step, rate))
        for each, found in written.items():
            assert found * slower(restarts, each) == rate
    assert slower(restarts, 0) == 1


def test_all_learning_rates_are_slowed_also_those_to_come() -> None:
    """Groups keep their ratio, and the schedule goes on from where it is."""
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    optimizer, plain = (
        torch.optim.AdamW(
            [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, (0.1, 0.4), strict=True)]
        )
        for _ in range(2)
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda n: 1 / (1 + n)) for each in (optimizer, plain)]
    for _ in range(3):
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.step()
    slow_down_(optimizer, schedules[0], 0.25)
    for _ in range(3):
        assert [0.25 * group["lr"] for group in plain.param_groups] == [group["lr"] for group in optimizer.param_groups]
        assert schedules[0].get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.step()


def test_a_restart_is_plain_values() -> None:
    """As the record and the note hold it."""
    restart = Restart("lost", 3, 0, 0.1)
    assert Restart(**attrs.asdict(restart)) == restart
