"""Parallel runs, each in its own process."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.quality import minilm, store
from benchmarks.quality.packages import cache_folder
from benchmarks.quality.runs import Run, execute
from benchmarks.quality.tasks import TASKS


def make(runs: list[Run], file: Path, jobs: int, console: Console) -> None:
    """Execute each run in its own process; only this process writes the rows."""
    cache = cache_folder()
    for name in {each.task for each in runs}:
        TASKS[name].cut(cache)  # downloaded once, before several processes race for it
    minilm.folder(cache)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Spawned: forking a process in which torch has threads is not safe.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent)
    unwritten: set[concurrent.futures.Future[store.Row]] = set()
    try:
        unwritten |= {pool.submit(execute, each, cache) for each in runs}
        finished = concurrent.futures.as_completed(list(unwritten))
        for done in track(finished, total=len(unwritten), console=console, description=file.stem):
            store.append(file, done.result())
            unwritten.discard(done)
    finally:
        # A failed run stops everything: queued runs are cancelled, and the rows of running ones are still written.
        pool.shutdown(cancel_futures=True)
        for left in unwritten:
            if not left.cancelled() and left.exception() is None:
                store.append(file, left.result())


def end_with_parent() -> None:
    """End this process when its parent ends, even if killed: nobody would write its row."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
