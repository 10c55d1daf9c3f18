"""Runs side by side, each in a process of its own."""

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
    """Each run in a process of its own, and its row added by this one alone."""
    cache = cache_folder()
    for name in {each.task for each in runs}:
        TASKS[name].cut(cache)  # fetched once, before processes would race for it
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
        # One that failed ends it all: what is not under way is left for the next time, and the rest is kept.
        pool.shutdown(cancel_futures=True)
        for left in unwritten:
            if not left.cancelled() and left.exception() is None:
                store.append(file, left.result())


def end_with_parent() -> None:
    """Let this process end when the one that made it does, killed or not: a row that it made would be lost."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
