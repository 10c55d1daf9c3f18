"""What it costs to start the command: ``python -m benchmarks.cold OUT [FILE]``, with a run's folder and an adapter.

CPU seconds (user and system) of a process, median of five after one that is not counted, so the disk is warm. Python
and ``import torch`` alone stand beside the commands.
"""

import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

_COMMAND = ("-m", "tunerkit_cli")
_REPEATS = 5


def cpu_seconds(arguments: tuple[str, ...]) -> tuple[float, str]:
    """Run Python with some arguments: the median of its CPU seconds, and what the last run printed on stderr."""
    seconds, stderr = [], ""
    for _ in range(_REPEATS + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        stderr = done.stderr
    return statistics.median(seconds[1:]), stderr


def main(
    out: Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.")],
    file: Annotated[Path | None, typer.Argument(help="An adapter. Default: the one in OUT.")] = None,
) -> None:
    """Print the table."""
    rows = {
        "python": ("-c", "pass"),
        "import torch": ("-c", "import torch"),
        "tunerkit --help": (*_COMMAND, "--help"),
        "tunerkit methods": (*_COMMAND, "methods"),
        "tunerkit show OUT": (*_COMMAND, "show", str(out)),
        "tunerkit show FILE": (*_COMMAND, "show", str(file or out / "adapter.safetensors")),
    }
    table = Table("process", "CPU seconds", "bytes on stderr")
    for name, arguments in rows.items():
        seconds, stderr = cpu_seconds(arguments)
        table.add_row(name, f"{seconds:.2f}", str(len(stderr.encode())))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
