"""The rows of the table, how one is run, and what counts as the right refusal."""

import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from tests.faults.isolation import Case, contained, in_warm_process, short
from tests.faults.subjects import Subject, subject

LONG = "TUNERKIT_LONG"


@attrs.frozen
class Fault:
    """One injected fault. ``outcome`` is empty if the code under test did right, else it says what went wrong."""

    case: str
    outcome: str


Attack = Callable[[Subject, int, Path], Iterator[Fault]]


@attrs.frozen
class Row:
    """One row of the table.

    Attributes:
        name: The row's name.
        done: What the cases do, in one sentence.
        failure: What counts as a failure, in one sentence.
        attack: Yields the faults: of a subject, as many as are asked for, in a folder that is empty at the start.
        short: The number of cases in ``make test``.
        long: The number of cases of the published table.
        peft: Why peft has no column; empty if it has one.
        needs: The modules that the row needs.
    """

    name: str
    done: str
    failure: str
    attack: Attack
    short: int
    long: int
    peft: str = ""
    needs: tuple[str, ...] = ()


@attrs.frozen
class Result:
    """What a row found: the number of cases, the failures, and the CPU seconds with those of all child processes."""

    row: str
    subject: str
    cases: int
    failures: tuple[Fault, ...]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.row}, {self.subject}: {len(self.failures)} failures in {self.cases} cases"]
        lines += [f"- {fault.case}: {fault.outcome}" for fault in self.failures[:20]]
        return "\n".join(lines)


def run(row: Row, name: str, count: int) -> Result:
    """Run a row against a subject, ``"tunerkit"`` or ``"peft"``, in a process of its own."""
    return in_warm_process(run_here, row, name, count)


def run_here(row: Row, name: str, count: int) -> Result:
    """Run a row in this process. It changes what is registered, and leaves threads and limits as they are."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    start = _cpu_seconds()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attacked = subject(name)
            _warm_up(attacked, folder / "warm")
            faults = list(row.attack(attacked, count, folder / "row"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failures = tuple(fault for fault in faults if fault.outcome)
    return Result(row.name, name, len(faults), failures, _cpu_seconds() - start)


def _warm_up(subject: Subject, folder: Path) -> None:
    """Do everything once: what is imported or compiled at the first use would cost each fork seconds."""
    (folder.parent / "row").mkdir()
    for kind in subject.kinds:
        model = subject.trained(kind)
        subject.save(model, folder)
        loaded = subject.load(folder)
        subject.merge(loaded)
        subject.unmerge(loaded)


def is_long() -> bool:
    """Whether the long form was asked for."""
    return os.environ.get(LONG, "") not in ("", "0")


def cases(row: str, subject: Subject, count: int) -> Iterator[tuple[int, str, random.Random]]:
    """Yield a number, a kind of adapter and a random generator for each case: the same in every run."""
    for number in range(count):
        yield number, subject.kinds[number % len(subject.kinds)], random.Random(f"{row}/{number}")


def limited(attacks: Iterable[Case]) -> Iterator[Fault]:
    """Run cases with limits on CPU time and memory."""
    yield from (Fault(label, outcome) for label, outcome in contained(list(attacks)))


def refused(subject: Subject, call: Callable[[], object], base: nn.Module | None = None) -> str:
    """Run a call that must be refused. Returns an empty text if it was, else what happened instead.

    tunerkit's contract says more than that an error is raised: it is a `TunerkitError` of bounded length, and the base
    is unchanged.
    """
    before = state_of(base) if base is not None and subject.strict else None
    try:
        call()
    except Exception as error:
        wrong = subject.wrong_error(error)
        if wrong:
            return wrong
        if base is not None and before is not None and not same_state(before, state_of(base)):
            return "it was refused, but the base model was changed"
        return ""
    return "there was no error"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all tensors of a model by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are equal, bit for bit and name for name, also where values are not finite."""
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, also where values are not finite."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)


def _cpu_seconds() -> float:
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def named(error: BaseException) -> str:
    """Return an error's class and text in one short line."""
    return f"{type(error).__name__}: {short(error)}"
