"""Run calls in processes of their own, with limits, so that a crash, a kill or a full disk ends one case only."""

import functools
import gc
import math
import multiprocessing
import os
import pickle
import resource
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NoReturn, TypeVar

T = TypeVar("T")
Call = Callable[[], str]
Case = tuple[str, Call]  # a label, and a call that returns what went wrong, or an empty text
CPU_SECONDS = 2
MEMORY = 300 * 2**20
# A fork that hangs is killed in the end. Cases take milliseconds: this is no limit on their time.
GUARD_SECONDS = 600


class ChildFailedError(AssertionError):
    """A process ended in a way that its caller did not expect."""


class WarmProcess:
    """A process with one thread, in which everything was imported and used once. It forks for each call.

    Forking a test process instead, whose threads may hold locks, could hang.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # There is one server in a process, and the first who uses it decides what its forks need not import again.
        context.set_forkserver_preload(["torch", "transformers", "tunerkit_testing.resuming"])
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def run(self, prepare: Callable[[], object], call: Callable[..., T], *arguments: object) -> T:
        """Run a module-level function in a fork. The process itself runs ``prepare`` before, once."""
        self._connection.send((prepare, call, arguments))
        try:
            worked, value = self._connection.recv()
        except EOFError:
            raise ChildFailedError("the process that runs the rows has ended") from None
        if not worked:
            raise ChildFailedError(value)
        result: T = value
        return result


@functools.cache
def warm_process() -> WarmProcess:
    """Return this process's own warm process."""
    return WarmProcess()


def _serve(connection: Any) -> None:
    import torch

    torch.set_num_threads(1)
    prepared: list[object] = []
    while True:
        try:
            prepare, call, arguments = connection.recv()
        except EOFError:
            return
        if prepare not in prepared:
            prepare()
            prepared.append(prepare)
            # What is there stays as it is: without this, the collector of each fork would copy it.
            gc.freeze()
        pid = os.fork()
        if pid == 0:
            _report(connection, call, arguments)
        _, status = os.waitpid(pid, 0)
        if status:
            connection.send((False, f"the process of the row ended with status {status}"))


def _report(connection: Any, call: Callable[..., object], arguments: tuple[object, ...]) -> NoReturn:
    _renew_threads()
    try:
        connection.send((True, call(*arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    os._exit(0)


def _renew_threads() -> None:
    """Let torch make its threads anew in a fork. Two threads that come first at once get an internal error of it."""
    import torch

    torch.set_num_threads(torch.get_num_threads())


def fork(call: Callable[[IO[bytes]], object]) -> "Child":
    """Start a process that runs ``call`` with the end of a pipe, and exits at once, without this process's cleanup."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Child(pid, os.fdopen(reading, "rb"))
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


class Child:
    """A forked process."""

    def __init__(self, pid: int, pipe: IO[bytes]) -> None:
        self.pid = pid
        self.pipe = pipe

    def outcomes(self) -> Iterator[str]:
        """Yield what the process reports, until it ends."""
        with self.pipe:
            while True:
                try:
                    outcome: str = pickle.load(self.pipe)
                except (EOFError, pickle.UnpicklingError):
                    return
                yield outcome

    def wait(self) -> int:
        """Wait for the end; return the signal that killed the process, or 0."""
        self.pipe.close()
        _, status = os.waitpid(self.pid, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

    def kill(self) -> None:
        """Kill the process, which cannot notice it."""
        os.kill(self.pid, signal.SIGKILL)


def contained(cases: Sequence[Case]) -> Iterator[tuple[str, str]]:
    """Run cases in forks with limits for each on CPU time and on additional memory.

    Yields each case's label with its outcome, or with how the process died. A fork runs cases until one kills it.
    """
    done = 0
    while done < len(cases):
        child = fork(lambda writing, rest=cases[done:]: _run_limited(writing, rest))  # type: ignore[misc]
        for outcome in child.outcomes():
            yield cases[done][0], outcome
            done += 1
        killed = child.wait()
        if done < len(cases):
            limit = f"it took more than {CPU_SECONDS} CPU seconds"
            yield cases[done][0], limit if killed == signal.SIGXCPU else f"the process died (signal {killed})"
            done += 1


def _run_limited(writing: IO[bytes], cases: Sequence[Case]) -> None:
    for _, call in cases:
        start = _cpu_seconds()
        most = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        # Whole seconds: the kernel stops what would run on, and the exact time is compared below.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(start) + CPU_SECONDS, resource.RLIM_INFINITY))
        outcome = outcome_of(call)
        taken = _cpu_seconds() - start
        if not outcome and taken > CPU_SECONDS:
            outcome = f"it took {taken:.1f} CPU seconds"
        pickle.dump(outcome, writing)
        writing.flush()


def outcome_of(call: Call) -> str:
    """Return what a case says, or which exception left it."""
    try:
        return call()[:1000]
    except BaseException as error:
        return f"{type(error).__name__} that no case expects: {short(error)}"


def in_fork(call: Call) -> str:
    """Run one case in a fork, which may change anything in its process."""
    child = fork(lambda writing: pickle.dump(outcome_of(call), writing))
    outcomes = list(child.outcomes())
    killed = child.wait()
    return outcomes[0] if outcomes else f"the process died (signal {killed})"


def limit_file_size(limit: int) -> None:
    """Let this process make no file longer than ``limit`` bytes, as if the disk were full there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def short(error: BaseException) -> str:
    """Return an error's text in one line of limited length, also if its ``str()`` raises."""
    try:
        return " ".join(str(error).split())[:200]
    except Exception as problem:
        return f"(str() raises {type(problem).__name__})"
