"""How many files a reader passes on the way of a call: ``python -m benchmarks.walks``, in a second.

A model of two linear layers with AdaLoRA is wrapped, attached, trained, saved and loaded. For each call, a profiler
counts the files of the project that are entered, the calls of their functions, and the returns: how often the way goes
back to a file that it had left. Everything ran once before, so imports and caches do not count.
"""

import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import tunerkit

ROOT = Path(__file__).parents[1]


@attrs.frozen
class Walk:
    """The way of one call: the file of each function that was called, in order."""

    name: str
    steps: Sequence[str]

    @property
    def files(self) -> list[str]:
        """The files, each once, as they are entered first."""
        return list(dict.fromkeys(self.steps))

    @property
    def returns(self) -> int:
        """How often the way goes back to a file that it had left."""
        moves = sum(one != other for one, other in itertools.pairwise(self.steps))
        return moves - max(len(self.files) - 1, 0)


def walked(name: str, call: Callable[[], object], steps: list[str] | None = None) -> Walk:
    """Run ``call`` and note each call of a function of the project, in ``steps`` if it is given."""
    steps = [] if steps is None else steps

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(_SOURCES):
            steps.append(path.removeprefix(f"{ROOT}/").removeprefix("plugins/"))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Walk(name, steps)


_SOURCES = (f"{ROOT}/tunerkit/", f"{ROOT}/plugins/")


def walks() -> list[Walk]:
    """The way of each call of one training. The first training warms up imports and caches."""
    list(_training())
    return list(_training())


def steps(found: Sequence[Walk]) -> Iterator[tuple[Walk, Walk]]:
    """The walks of steps after the first, each with that of its hook after the update."""
    for one, other in itertools.pairwise(found):
        if one.name.startswith("step ") and one.name != "step first":
            yield one, other


def _training() -> Iterator[Walk]:
    """Wrap, attach, four steps, save and load: the third step allocates, and the fourth makes the final allocation."""
    model = _model()
    settings = {"target_rank": 2, "init_rank": 4, "targets": ["0", "2"], "t_init": 1, "t_final": 2, "delta_t": 3}
    yield walked("wrap", lambda: tunerkit.wrap(model, "adalora", settings))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    yield walked("attach", lambda: tunerkit.attach(model, optimizer, total_steps=6))
    for what in ("first", "with averages only", "with an allocation", "with the final shrink", "after the end"):
        model(torch.ones(2, 8)).square().mean().backward()
        steps: list[str] = []
        marks: list[int] = []
        # The last hook before the update: what comes after it is the hook after the update.
        mark = optimizer.register_step_pre_hook(functools.partial(_mark, marks, steps))
        yield walked(f"step {what}", optimizer.step, steps)
        yield Walk("  the hook after it", steps[marks[0] :])
        mark.remove()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        yield walked("save", lambda: tunerkit.save(model, folder))
        base = _model()
        yield walked("load", lambda: tunerkit.load(base, folder))


def _mark(marks: list[int], steps: Sequence[str], *_: object) -> None:
    marks.append(len(steps))


def _model() -> Any:
    torch.manual_seed(0)  # an adapter is loaded onto the base that it was trained on
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def main() -> None:
    """Print the table."""
    table = Table("call", "files", "calls", "returns")
    for walk in walks():
        table.add_row(walk.name, str(len(walk.files)), str(len(walk.steps)), str(walk.returns))
    Console().print(table)


if __name__ == "__main__":
    main()
