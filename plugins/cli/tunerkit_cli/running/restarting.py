"""Restarts of a run that has collapsed: from its last good checkpoint, at half the learning rate."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Final

import attrs

from tunerkit import FileError, TunerkitError
from tunerkit.errors import shown
from tunerkit_cli.report.record import Problem, Restart
from tunerkit_cli.running import written
from tunerkit_cli.running.record import write_json
from tunerkit_cli.running.written import CHECKPOINTS

# A quarter of the rate is as far as the rate alone is likely to be the reason.
MOST: Final = 2
SLOWER: Final = 0.5
_FILE: Final = "restarts.json"  # in the folder of checkpoints, for --resume
_CHECKPOINT: Final = "checkpoint-"


class LostError(TunerkitError):
    """A run that may be restarted has collapsed.

    Attributes:
        problem: How.
        good: The last step at which its loss was good.
    """

    def __init__(self, problem: Problem, good: int) -> None:
        super().__init__(problem.text)
        self.problem, self.good = problem, good


def read_restarts(folder: Path) -> tuple[Restart, ...]:
    """The restarts of the run in an output folder, the oldest first."""
    file = folder / CHECKPOINTS / _FILE
    if not file.is_file():
        return ()
    try:
        return tuple(Restart(**each) for each in json.loads(file.read_text(encoding="utf-8"))["restarts"])
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise FileError(f"{file}: is damaged ({shown(str(problem))}); pass --overwrite to begin again") from problem


def roll_back(folder: Path, lost: LostError, rate: float) -> Restart:
    """Remove the checkpoints after the last good one, and note the restart. ``rate`` is the peak so far."""
    steps = {int(path.name.removeprefix(_CHECKPOINT)): path for path in _checkpoints(folder)}
    before = {restart.from_step for restart in read_restarts(folder)}  # never twice from the same checkpoint
    good = max((step for step in steps if step <= lost.good and step not in before), default=0)
    ours = written.run_files(folder) or ()
    for step in sorted(steps, reverse=True):
        if step > good:
            written.remove(folder, [path for path in ours if path.startswith(f"{CHECKPOINTS}/{steps[step].name}/")])
    restart = Restart(lost.problem.text, lost.problem.step, good, SLOWER * rate)
    noted = {"restarts": [attrs.asdict(each) for each in (*read_restarts(folder), restart)]}
    written.note(folder, [f"{CHECKPOINTS}/{_FILE}"])
    write_json(folder / CHECKPOINTS / _FILE, noted)  # last: a run that is killed before collapses again
    return restart


def slower(restarts: Sequence[Restart], step: int) -> float:
    """By how much the learning rate of a checkpoint is to be multiplied: once for each restart since it was written.

    A restart removes what is later than the step that it goes back to, so a later checkpoint was written after it.
    """
    since = takewhile(lambda restart: step <= restart.from_step, reversed(restarts))
    return float(SLOWER ** len([*since])) if step else 1.0


def _checkpoints(folder: Path) -> list[Path]:
    found = (folder / CHECKPOINTS).glob(f"{_CHECKPOINT}*")
    return [path for path in found if path.name.removeprefix(_CHECKPOINT).isdecimal()]
