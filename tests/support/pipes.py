"""A pipe in the place of a file: whoever opens it waits for a writer. Here one comes, so that no test waits."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def pipe(path: Path) -> Iterator[Path]:
    """Inside the block there is a pipe at ``path``, and who reads it finds an empty file."""
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: os.close(os.open(path, os.O_WRONLY)))  # opening waits for a reader
    writer.start()
    try:
        yield path
    finally:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # if nobody else came
        writer.join()
        os.close(reader)
        path.unlink()
