"""Run calls in forks, with limits, so that a crash, a kill or a full disk ends one case only."""

import contextlib
import functools
import gc
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from tests.support.two_processes import PRELOADED

Case = tuple[str, Callable[[], str]]  # a label, and a call that returns what went wrong, or an empty text
Attack = Callable[[int, Path], Iterable[tuple[str, str]]]  # number of cases, empty folder -> labels and outcomes
CPU_SECONDS = 2
MEMORY = 300 * 2**20
GUARD_SECONDS = 600  # a fork that hangs is killed in the end; cases take milliseconds


def failures(attack: Attack, count: int, prepare: Callable[[], object] = int) -> list[str]:
    """Run ``count`` cases of an attack in a fork of a process with one thread, in which ``prepare`` ran once."""
    worked, found = _warm_process()(prepare, attack, count)
    assert worked, found
    labels, outcomes = zip(*found, strict=True)
    assert len(labels) == count
    return [f"{label}: {outcome}" for label, outcome in zip(labels, outcomes, strict=True) if outcome]


@functools.cache
def _warm_process() -> Callable[..., Any]:
    context = multiprocessing.get_context("forkserver")
    # There is one server in a process, and the first who uses it decides what its forks need not import again.
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there,), daemon=True).start()
    there.close()

    def run(*what: object) -> Any:
        here.send(what)
        return here.recv()

    return run


def _serve(connection: Any) -> None:
    _renew_threads(1)
    prepared: list[object] = []
    while True:
        try:
            prepare, attack, count = connection.recv()
        except EOFError:
            return
        if prepare not in prepared:
            try:
                prepare()
            except BaseException:
                connection.send((False, traceback.format_exc()))
                continue
            prepared.append(prepare)
            gc.freeze()  # without this, the collector of each fork would copy what is there
        pid = os.fork()
        if pid == 0:
            _report(connection, attack, count)
        _, status = os.waitpid(pid, 0)
        if status:
            connection.send((False, f"the process of {attack.__name__} ended with status {status}"))


def _report(connection: Any, attack: Attack, count: int) -> NoReturn:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    _renew_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            connection.send((True, list(attack(count, folder))))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _renew_threads(count: int | None = None) -> None:
    """Let torch make its threads anew in a fork. Two threads that come first at once get an internal error of it."""
    import torch

    torch.set_num_threads(count or torch.get_num_threads())


class Child:
    """A forked process, which runs ``call`` with the end of a pipe, and exits without this process's cleanup."""

    def __init__(self, call: Callable[[IO[bytes]], object]) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            self.pipe = os.fdopen(reading, "rb")
            return
        os.close(reading)
        signal.alarm(GUARD_SECONDS)
        _renew_threads()
        try:
            with os.fdopen(writing, "wb") as pipe:
                call(pipe)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def answers(self) -> Iterator[Any]:
        """Yield what the process writes with pickle, until it ends."""
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                yield pickle.load(self.pipe)

    def wait(self) -> int:
        """Wait for the end; return the signal that killed the process, or 0."""
        self.pipe.close()
        _, status = os.waitpid(self.pid, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def asked(call: Callable[[], Any]) -> Any:
    """Return what a call returns in a fork."""
    child = Child(lambda pipe: pickle.dump(call(), pipe))
    (answer,) = child.answers()
    child.wait()
    return answer


def in_fork(call: Callable[[], str]) -> str:
    """Run one case in a fork, which may change anything in its process."""
    child = Child(lambda pipe: pickle.dump(_outcome_of(call), pipe))
    outcomes = list(child.answers())
    killed = child.wait()
    return outcomes[0] if outcomes else f"the process died (signal {killed})"


def limited(cases: Iterable[Case]) -> Iterator[tuple[str, str]]:
    """Run cases in forks with `CPU_SECONDS` and `MEMORY`; yields each label with its outcome, or how the fork died."""
    left = list(cases)
    while left:
        child = Child(lambda pipe, rest=left: _run_limited(pipe, rest))  # type: ignore[misc]
        for outcome in child.answers():
            yield left.pop(0)[0], outcome
        killed = child.wait()
        if left:
            limit = f"it took more than {CPU_SECONDS} CPU seconds"
            yield left.pop(0)[0], limit if killed == signal.SIGXCPU else f"the process died (signal {killed})"


def _run_limited(pipe: IO[bytes], cases: Sequence[Case]) -> None:
    for _, call in cases:
        start = _cpu_seconds()
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        # Whole seconds: the kernel stops what would run on, and the exact time is compared below.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(start) + CPU_SECONDS, resource.RLIM_INFINITY))
        outcome = _outcome_of(call)
        taken = _cpu_seconds() - start
        if not outcome and taken > CPU_SECONDS:
            outcome = f"it took {taken:.1f} CPU seconds"
        pickle.dump(outcome, pipe)
        pipe.flush()


def _outcome_of(call: Callable[[], str]) -> str:
    try:
        return call()[:1000]
    except BaseException as error:
        return f"{type(error).__name__} that no case expects: {str(error)[:200]}"


def limit_file_size(limit: int) -> None:
    """Let this process make no file longer than ``limit`` bytes, as if the disk were full there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
