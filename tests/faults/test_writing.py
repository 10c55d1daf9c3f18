"""Saves that are killed, fail at any system call, or have no room: the older or the newer adapter is there."""

import builtins
import errno
import io
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import torch

import tunerkit
from tests.faults.adapters import FILE, kinds, net, output, trained, warm_up, wrong_error
from tests.faults.forks import Child, asked, failures, in_fork, limit_file_size

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the faults are injected in forks")


class Pair:
    """An older and a newer adapter of one kind, with different ranks, and folders that have the older one."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        old, self.new = trained(kind, seed=1, rank=2), trained(kind, seed=2, rank=3)
        self.outputs = (output(old), output(self.new))
        self.data = tunerkit.save(old, folder / f"old-{kind}").read_bytes()

    def place(self, name: object) -> Path:
        """Return a new folder with the older adapter."""
        place = self.folder / f"{self.kind}-{name}"
        place.mkdir()
        (place / FILE).write_bytes(self.data)
        return place

    def wrong(self, place: Path, *, tidy: bool = True) -> str:
        """Return an empty text if the folder has the older or the newer adapter, and no other file if ``tidy``."""
        try:
            found = output(tunerkit.load(net(), place))
        except Exception as error:
            return f"neither the older nor the newer adapter can be loaded: {type(error).__name__}: {str(error)[:150]}"
        if not any(torch.equal(found, each) for each in self.outputs):
            return "what is loaded is a mixture of the older and the newer adapter"
        more = sorted({path.name for path in place.iterdir()} - {FILE})
        return f"files are left behind: {more}" if tidy and more else ""


def cases(count: int, folder: Path) -> Iterator[tuple[int, Pair, random.Random]]:
    """Yield a number, a pair and a random generator for each case: the same in every run."""
    pairs = [Pair(kind, folder) for kind in kinds()]
    for number in range(count):
        yield number, pairs[number % len(pairs)], random.Random(number)


# --- Kills ------------------------------------------------------------------------------------------------------------


def kills(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Kill the process that overwrites an adapter: at one of Python's or C's calls, or after a random time."""
    calls: dict[str, tuple[int, int]] = {}
    for number, pair, chance in cases(count, folder):
        place = pair.place(number)
        save = partial(tunerkit.save, pair.new, place)
        first, last = calls.get(pair.kind) or calls.setdefault(pair.kind, asked(partial(_calls_of, pair)))
        if number // len(kinds()) % 4:
            # Most of a save's calls prepare the tensors, so most kills come after the first one that writes.
            at = chance.randrange(first if chance.random() < 0.75 else 1, last + 1)
            label, by, killed = f"at call {at} of {last}", signal.SIGKILL, partial(_killed_at, at, save)
        else:
            seconds = chance.uniform(1e-4, 8e-3)
            label, by, killed = f"after {1e3 * seconds:.2f} ms", signal.SIGALRM, partial(_killed_after, seconds, save)
        died = Child(killed).wait()
        outcome = pair.wrong(place, tidy=False) if died == by else f"it was not killed (signal {died})"
        if not outcome:  # what a killed process leaves must not be in the way of the next one
            save()
            new = torch.equal(output(tunerkit.load(net(), place)), pair.outputs[1])
            outcome = pair.wrong(place) if new else "saving again does not replace the adapter"
        yield f"{pair.kind}, killed {label}", outcome


def _calls_of(pair: Pair) -> tuple[int, int]:
    """Return the number of the first call that writes, and of all calls and returns in a save."""
    events = first = 0

    def note(frame: object, event: str, argument: Any) -> None:
        nonlocal events, first
        events += 1
        if not first and event == "c_call" and argument.__name__ == "mkdir":  # of the folder
            first = events

    place = pair.folder / f"count-{pair.kind}"
    tunerkit.save(pair.new, place)  # what is imported or cached once is not counted
    sys.setprofile(note)
    tunerkit.save(pair.new, place)
    sys.setprofile(None)
    return first or 1, events


def _killed_at(number: int, call: Callable[[], object], _: IO[bytes]) -> None:
    left = number

    def note(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(note)
    call()


def _killed_after(seconds: float, call: Callable[[], object], _: IO[bytes]) -> None:
    # The default action of SIGALRM ends the process at once, and nothing in it runs any more.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    while True:  # a save that was faster than the timer is followed by another
        call()


def test_after_a_kill_the_older_or_the_newer_adapter_is_there() -> None:
    """And the next save works, and removes what the killed one left."""
    assert failures(kills, 40, warm_up) == []


# --- Failing calls ----------------------------------------------------------------------------------------------------


class Faulty:
    """Makes the k-th call of one function that writes fail; only a fork uses it, so nothing is restored."""

    patched = ("write", "fsync", "replace", "rename", "mkdir", "chmod", "fchmod", "link")

    def __init__(self, function: str = "", at: int = 0, error: int = errno.EIO) -> None:
        self.function, self.at, self.error = function, at, error
        self.counts = dict.fromkeys((*self.patched, "open", "close"), 0)

    def note(self, function: str) -> None:
        """Count a call, and raise if it is the one that fails."""
        self.counts[function] += 1
        if function == self.function and self.counts[function] == self.at:
            raise KeyboardInterrupt if self.error == errno.EINTR else OSError(self.error, os.strerror(self.error))

    def install(self) -> None:
        """Replace the functions in this process."""
        for name in self.patched:
            setattr(os, name, partial(self._counted, name, getattr(os, name)))
        plain_os_open, plain_open = os.open, builtins.open

        def os_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.note("open")
            return plain_os_open(path, flags, *rest, **options)

        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return plain_open(file, mode, *rest, **options)
            if not isinstance(file, int):
                self.note("open")
            buffered = io.BufferedWriter(_FaultyFile(self, file, mode))
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=options.get("encoding"))

        os.open = os_open
        builtins.open = io.open = os.fdopen = opened  # type: ignore[assignment]

    def _counted(self, name: str, plain: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.note(name)
        return plain(*arguments, **options)


class _FaultyFile(io.FileIO):
    def __init__(self, faulty: Faulty, file: Any, mode: str) -> None:
        self._faulty = faulty
        super().__init__(file, "".join(set(mode) & set("wxa+")))

    def write(self, data: Any) -> int:  # type: ignore[override]
        self._faulty.note("write")
        return super().write(data)

    def close(self) -> None:
        failed = None
        if not self.closed:
            try:
                self._faulty.note("close")
            except OSError as error:  # the file is closed all the same, as in the kernel
                failed = error
        super().close()
        if failed is not None:
            raise failed


_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EINTR)


def failing_calls(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Fail the k-th open, write, fsync, rename and so on of a save, with each of six errors."""
    possible: dict[str, list[tuple[str, int]]] = {}
    for number, pair, chance in cases(count, folder):
        ways = possible.get(pair.kind) or possible.setdefault(pair.kind, asked(partial(_possible_failures, pair)))
        function, at = ways[number // len(kinds()) % len(ways)]
        error = chance.choice(_ERRORS)
        fail = Faulty(function, at, error).install
        yield (
            f"{pair.kind}, {function} {at} fails with {errno.errorcode[error]}",
            in_fork(partial(_save_fails, pair, pair.place(number), fail)),
        )


def _possible_failures(pair: Pair) -> list[tuple[str, int]]:
    faulty, place = Faulty(), pair.place("counted")
    faulty.install()
    tunerkit.save(pair.new, place)
    return [(name, at) for name, calls in dict(faulty.counts).items() for at in range(1, calls + 1)]


def _save_fails(pair: Pair, place: Path, prepare: Callable[[], object]) -> str:
    """Save after ``prepare``; the save raises the right error, or has worked, and the files are whole and tidy."""
    prepare()
    try:
        tunerkit.save(pair.new, place)
    except KeyboardInterrupt:
        return pair.wrong(place)
    except Exception as error:
        return wrong_error(error) or pair.wrong(place)
    new = torch.equal(output(tunerkit.load(net(), place)), pair.outputs[1])
    return pair.wrong(place) if new else "there was no error, and the older adapter is still there"


def test_if_any_system_call_of_a_save_fails_the_older_adapter_stays() -> None:
    """And nothing else is left; the error is ours, or Ctrl-C."""
    assert failures(failing_calls, 60, warm_up) == []


# --- A full disk ------------------------------------------------------------------------------------------------------


def full_disk(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """Save where a file can grow to k bytes only, as on a full disk."""
    for number, pair, chance in cases(count, folder):
        limit, place = chance.randrange(len(pair.data)), pair.place(number)
        outcome = in_fork(partial(_save_fails, pair, place, partial(limit_file_size, limit)))
        if not outcome and (place / FILE).read_bytes() != pair.data:
            outcome = "the older adapter's file was changed"
        yield f"{pair.kind}, full after {limit} bytes", outcome


def test_without_room_for_the_whole_file_the_older_one_stays() -> None:
    """As it was, bit for bit."""
    assert failures(full_disk, 24, warm_up) == []
