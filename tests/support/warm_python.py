"""Run scripts and modules in forks of one process that has imported torch and transformers, which takes 15 seconds."""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import attrs

# Nothing of ours: what it does at import belongs to each run.
IMPORTED = (
    *("torch._dynamo", "torch.optim", "torch.distributed.checkpoint", "accelerate", "datasets", "safetensors.torch"),
    *("transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert"),
)
GUARD_SECONDS = 1800  # a run that hangs is killed in the end


@attrs.frozen
class Done:
    """How a run ended."""

    returncode: int
    stdout: str
    stderr: str


def run(folder: Path, *arguments: str, **variables: str) -> Done:
    """Run a script, or ``-m`` and a module, as a new process with these variables would; libraries are imported."""
    return _run_each(folder, arguments, [variables])


def run_together(folder: Path, *arguments: str, processes: int, **variables: str) -> Done:
    """Run a script in several processes with the variables that torchrun gives them."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The store is here, as it is in torchrun's own process.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _run_each(folder, arguments, [{**variables, **own} for own in ranks])


def _run_each(folder: Path, arguments: Sequence[str], variables: Sequence[Mapping[str, str]]) -> Done:
    """Run one process for each mapping of variables at the same time; if one fails, the others are killed."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as outputs:
        files = [(f"{outputs}/{number}.out", f"{outputs}/{number}.err") for number in range(len(variables))]
        runs = [(own, *written) for own, written in zip(variables, files, strict=True)]
        server.stdin.write(json.dumps([str(folder), arguments, runs]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that runs the scripts has ended"
        out, err = (
            "".join(Path(each).read_text(errors="replace") for each in kind) for kind in zip(*files, strict=True)
        )
        return Done(int(answer), out, err)


@functools.cache
def _server() -> "subprocess.Popen[str]":
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, env=environment, text=True)


def _serve() -> None:
    sys.path.pop(0)  # this file's folder, whose site.py and others have names of the standard library's
    # What a library prints at import must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTED:
        with contextlib.suppress(Exception):  # not installed, or not for these versions of others
            importlib.import_module(name)
    sys.stdout.flush()
    gc.freeze()
    for line in sys.stdin:
        folder, arguments, runs = json.loads(line)
        running, code = set[int](), 0
        for variables, out, err in runs:
            if not (pid := os.fork()):
                answers.close()
                _run(folder, arguments, variables, out, err)
            running.add(pid)
        while running:
            pid, status = os.wait()
            running.discard(pid)
            if not code and (code := os.waitstatus_to_exitcode(status)):
                for other in running:  # it would wait for the one that has failed
                    os.kill(other, signal.SIGKILL)
        print(code, file=answers, flush=True)


def _run(folder: str, arguments: list[str], variables: dict[str, str], out: str, err: str) -> NoReturn:
    signal.alarm(GUARD_SECONDS)
    # What the libraries registered is the server's, but for one: it ends the processes that the run starts.
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]  # typeshed omits it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ |= variables
    code = 0
    try:
        if arguments[0] == "-m":
            sys.path.insert(0, folder)
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and end.code is not code:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As an interpreter ends: it waits for threads first.
    threading._shutdown()  # type: ignore[attr-defined]  # typeshed omits it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
