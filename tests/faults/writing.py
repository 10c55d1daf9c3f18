"""Rows about writing: kills, failing system calls, a full disk, writers beside a reader, and file modes."""

import builtins
import contextlib
import errno
import io
import os
import pickle
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from tests.faults.harness import Fault, cases
from tests.faults.isolation import Child, fork, in_fork, limit_file_size
from tests.faults.subjects import Peft, Subject, output

OLD, NEW = 1, 2  # the seeds of the two adapters, which also have different ranks


class Pair:
    """An older and a newer adapter of each kind, and a folder that holds the older one at the start of each case."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder
        self.new = {kind: subject.trained(kind, seed=NEW, rank=3) for kind in subject.kinds}
        self.outputs = {}
        self.files: dict[str, dict[str, bytes]] = {}
        for kind in subject.kinds:
            old = subject.trained(kind, seed=OLD, rank=2)
            subject.save(old, folder / f"old-{kind}")
            self.outputs[kind] = (output(old), output(self.new[kind]))
            self.files[kind] = {path.name: path.read_bytes() for path in (folder / f"old-{kind}").iterdir()}

    def place(self, kind: str, number: int) -> Path:
        """Return a new folder with the older adapter."""
        place = self.folder / f"case-{number}"
        place.mkdir()
        for name, data in self.files[kind].items():
            (place / name).write_bytes(data)
        return place

    def wrong(self, place: Path, kind: str, *, tidy: bool = True) -> str:
        """Return an empty text if the folder has the older or the newer adapter, and no other file if ``tidy``."""
        try:
            found = output(self.subject.load(place))
        except Exception as error:
            return f"neither the older nor the newer adapter can be loaded: {type(error).__name__}: {str(error)[:150]}"
        if not any(torch.equal(found, each) for each in self.outputs[kind]):
            return "what is loaded is a mixture of the older and the newer adapter"
        more = {path.name for path in place.iterdir()} - set(self.files[kind])
        return f"files are left behind: {sorted(more)}" if tidy and more else ""

    def is_old(self, place: Path, kind: str) -> bool:
        """Whether the files that hold the adapter are those of the older one; a description may differ."""
        return all((place / name).read_bytes() == self.files[kind][name] for name in _names(self.subject))


def _names(subject: Subject) -> tuple[str, ...]:
    return (subject.file, "adapter_config.json") if isinstance(subject, Peft) else (subject.file,)


# --- Kills ------------------------------------------------------------------------------------------------------------


def kills(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Kill the process that overwrites an adapter: at one of Python's calls, or after a random time."""
    pair = Pair(subject, folder)
    calls = {kind: _calls_of(pair, kind) for kind in subject.kinds}
    for number, kind, chance in cases("kills in mid-save", subject, count):
        place = pair.place(kind, number)
        if number // len(subject.kinds) % 4:
            # Most of a save's calls prepare the tensors, so most kills come after the first one that writes.
            first, last = calls[kind]
            at = chance.randrange(first if chance.random() < 0.75 else 1, last + 1)
            label = f"at call {at} of {last}"
            child = fork(lambda _, p=place, k=kind, a=at: _killed_at(a, lambda: subject.save(pair.new[k], p)))  # type: ignore[misc]
        else:
            seconds = chance.uniform(1e-4, 8e-3)
            label = f"after {1e3 * seconds:.2f} ms"
            child = fork(lambda _, p=place, k=kind, s=seconds: _killed_after(s, lambda: subject.save(pair.new[k], p)))  # type: ignore[misc]
        child.wait()
        outcome = pair.wrong(place, kind, tidy=False)
        if not outcome:  # what a killed process leaves must not be in the way of the next one
            subject.save(pair.new[kind], place)
            found = output(subject.load(place))
            outcome = "" if torch.equal(found, pair.outputs[kind][1]) else "saving again does not replace the adapter"
        yield Fault(f"{number}: {kind}, killed {label}", outcome)


def _calls_of(pair: Pair, kind: str) -> tuple[int, int]:
    """Return the number of the first call that writes, and of all calls and returns in a save."""

    def count(writing: IO[bytes]) -> None:
        events = first = 0

        def note(frame: object, event: str, argument: Any) -> None:
            nonlocal events, first
            events += 1
            if not first and event == "c_call" and argument.__name__ == "mkdir":  # of the folder
                first = events

        place = pair.folder / f"count-{kind}"
        pair.subject.save(pair.new[kind], place)  # what is imported or cached once is not counted
        sys.setprofile(note)
        pair.subject.save(pair.new[kind], place)
        sys.setprofile(None)
        pickle.dump(f"{first or 1} {events}", writing)

    child = fork(count)
    first, events = next(child.outcomes()).split()
    child.wait()
    return int(first), int(events)


def _killed_at(number: int, call: Callable[[], object]) -> None:
    left = number

    def note(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(note)
    call()


def _killed_after(seconds: float, call: Callable[[], object]) -> None:
    # The default action of SIGALRM ends the process at once, and nothing in it runs any more.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    while True:  # a save that was faster than the timer is followed by another
        call()


# --- Failing calls ----------------------------------------------------------------------------------------------------


class Faulty:
    """Patches the system calls that write, and fails one of them: the k-th call of one function.

    Only a fork uses it, so nothing is restored.
    """

    functions = ("open", "write", "close", "fsync", "replace", "rename", "mkdir", "chmod", "fchmod", "link")

    def __init__(self, function: str = "", at: int = 0, error: int = errno.EIO) -> None:
        self.function, self.at, self.error = function, at, error
        self.counts = dict.fromkeys(self.functions, 0)

    def note(self, function: str) -> None:
        """Count a call, and raise if it is the one that fails."""
        self.counts[function] += 1
        if function == self.function and self.counts[function] == self.at:
            raise KeyboardInterrupt if self.error == errno.EINTR else OSError(self.error, os.strerror(self.error))

    def install(self) -> None:
        """Replace the functions in this process."""
        for name in ("write", "fsync", "replace", "rename", "mkdir", "chmod", "fchmod", "link"):
            setattr(os, name, self._counted(name, getattr(os, name)))
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
            raw = _FaultyFile(self, file, mode)
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=options.get("encoding"))

        os.open = os_open
        builtins.open = opened  # type: ignore[assignment]
        io.open = opened  # type: ignore[assignment]
        os.fdopen = opened  # type: ignore[assignment]

    def _counted(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.note(name)
            return plain(*arguments, **options)

        return call


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


def failing_calls(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Fail the k-th open, write, fsync, rename and so on of a save, with each of six errors."""
    pair = Pair(subject, folder)
    possible = {kind: _possible_failures(pair, kind) for kind in subject.kinds}
    for number, kind, chance in cases("failing calls", subject, count):
        function, at = possible[kind][number // len(subject.kinds) % len(possible[kind])]
        error = chance.choice(_ERRORS)
        place = pair.place(kind, number)
        faulty = Faulty(function, at, error)
        outcome = in_fork(lambda f=faulty, p=place, k=kind: _save_fails(pair, k, p, f.install))  # type: ignore[misc]
        yield Fault(f"{number}: {kind}, {function} {at} fails with {errno.errorcode[error]}", outcome)


def _possible_failures(pair: Pair, kind: str) -> list[tuple[str, int]]:
    def count(writing: IO[bytes]) -> None:
        faulty = Faulty()
        place = pair.place(kind, -1)
        faulty.install()
        pair.subject.save(pair.new[kind], place)
        found = dict(faulty.counts)
        pickle.dump(repr([(name, at) for name, calls in found.items() for at in range(1, calls + 1)]), writing)

    child = fork(count)
    text = next(child.outcomes())
    child.wait()
    for path in (pair.folder / "case--1").iterdir():
        path.unlink()
    (pair.folder / "case--1").rmdir()
    found: list[tuple[str, int]] = eval(text, {})  # our own list of names and numbers
    return found


def _save_fails(pair: Pair, kind: str, place: Path, prepare: Callable[[], object]) -> str:
    """Save after ``prepare``; the save raises the right error, or has worked, and the files are whole and tidy."""
    prepare()
    wrong, failed = "", True
    try:
        pair.subject.save(pair.new[kind], place)
        failed = False
    except KeyboardInterrupt:
        pass
    except Exception as error:
        wrong = pair.subject.wrong_error(error)
    if wrong:
        return wrong
    found = pair.wrong(place, kind)
    if found or failed:
        return found
    new = torch.equal(output(pair.subject.load(place)), pair.outputs[kind][1])
    return "" if new else "there was no error, and the older adapter is still there"


# --- Flushes ----------------------------------------------------------------------------------------------------------


def flushes(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Note the order in which a save flushes and renames: over an older file, and in folders that are new."""
    pair = Pair(subject, folder)
    for number, kind, _ in cases("flushes", subject, count):
        depth = number // len(subject.kinds) % 3
        place = folder / f"new-{number}" / "/".join("abc"[:depth]) if depth else pair.place(kind, number)
        outcome = in_fork(lambda p=place, k=kind: _flushed(pair, k, p))  # type: ignore[misc]
        yield Fault(f"{number}: {kind}, {depth + 1 if depth else 0} new folders", outcome)


def _flushed(pair: Pair, kind: str, place: Path) -> str:
    """Save, and say what a power failure could take: a file or a folder's entry that was not flushed in time."""
    events: list[tuple[str, int, int]] = []  # what was done, the number of the file or folder, and its size
    plain_fsync, plain_replace = os.fsync, os.replace

    def fsync(number: int) -> None:
        plain_fsync(number)
        found = os.fstat(number)
        events.append(("flush", found.st_ino, found.st_size))

    def replace(old: Any, new: Any) -> None:
        found = os.stat(old)
        events.append(("rename", found.st_ino, found.st_size))
        plain_replace(old, new)

    folders = [place, *(above.parent for above in (place, *place.parents) if not above.exists())]
    os.fsync, os.replace = fsync, replace  # type: ignore[assignment]
    pair.subject.save(pair.new[kind], place)
    renames = [number for number, event in enumerate(events) if event[0] == "rename"]
    if not renames:
        return "no file was renamed to its place"
    for number in renames:
        if ("flush", *events[number][1:]) not in events[:number]:
            return "a file was renamed to its place before its content was flushed"
    flushed = {number for what, number, _ in events[renames[-1] :] if what == "flush"}
    missed = [str(each.relative_to(pair.folder)) for each in folders if each.stat().st_ino not in flushed]
    return f"after the rename, these folders were not flushed: {missed}" if missed else ""


def full_disk(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Save where a file can grow to k bytes only, as on a full disk."""
    pair = Pair(subject, folder)
    for number, kind, chance in cases("full disk", subject, count):
        limit = chance.randrange(max(len(data) for data in pair.files[kind].values()))
        place = pair.place(kind, number)
        outcome = in_fork(lambda n=limit, p=place, k=kind: _save_fails(pair, k, p, lambda: limit_file_size(n)))  # type: ignore[misc]
        if not outcome and not pair.is_old(place, kind):
            outcome = "the older adapter's files were changed"
        yield Fault(f"{number}: {kind}, full after {limit} bytes", outcome)


# --- Writers and a reader ---------------------------------------------------------------------------------------------


def two_writers(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Load, ``count`` times, while two processes save two adapters to the same place over and over."""
    pair = Pair(subject, folder)
    for start, kind in enumerate(subject.kinds):
        place = pair.place(kind, start)
        old = subject.trained(kind, seed=OLD, rank=2)
        writers = [_writer(subject, model, place) for model in (old, pair.new[kind])]
        try:
            for number in range(start, count, len(subject.kinds)):
                yield Fault(f"{number}: {kind}, load beside two writers", pair.wrong(place, kind, tidy=False))
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()


def _writer(subject: Subject, model: nn.Module, place: Path) -> Child:
    def write(_: IO[bytes]) -> None:
        while True:
            with contextlib.suppress(Exception):  # the reader judges what lies there
                subject.save(model, place)

    return fork(write)


# --- Modes ------------------------------------------------------------------------------------------------------------

_UMASKS = (0o022, 0o077, 0o002, 0o027, 0o000)
_MODES = (None, 0o600, 0o640, 0o644, 0o660, 0o664, 0o400, 0o444)


def modes(subject: Subject, count: int, folder: Path) -> Iterator[Fault]:
    """Save a new file, or over a file with some mode, under several umasks."""
    pair = Pair(subject, folder)
    before = os.umask(0o022)
    try:
        for number, kind, _ in cases("umask and modes", subject, count):
            index = number // len(subject.kinds)
            umask, mode = _UMASKS[index % len(_UMASKS)], _MODES[index % len(_MODES)]  # 5 and 8: all pairs come
            os.umask(0o022)
            place = pair.place(kind, number)
            os.umask(umask)
            yield Fault(
                f"{number}: {kind}, umask {umask:03o}, {_shown(mode)}", _mode_of_save(pair, kind, place, umask, mode)
            )
    finally:
        os.umask(before)


def _mode_of_save(pair: Pair, kind: str, place: Path, umask: int, mode: int | None) -> str:
    names = _names(pair.subject)
    for name in names:
        (place / name).unlink() if mode is None else (place / name).chmod(mode)
    pair.subject.save(pair.new[kind], place)
    expected = 0o666 & ~umask if mode is None else mode
    found = {name: stat.S_IMODE((place / name).stat().st_mode) for name in names}
    wrong = [f"{name} has mode {got:03o}, not {expected:03o}" for name, got in found.items() if got != expected]
    return "; ".join(wrong)


def _shown(mode: int | None) -> str:
    return "a new file" if mode is None else f"over a file of mode {mode:03o}"
