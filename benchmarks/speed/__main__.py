"""The command ``python -m benchmarks.speed``."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import attrs
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.speed import (
    allocator,
    alternatives,
    compiled,
    gpu,
    growth,
    memory,
    operations,
    profiled,
    small,
    start,
    steps,
)
from benchmarks.speed.machine import header
from benchmarks.speed.settings import Settings, read_sizes
from benchmarks.speed.tables import Row, limits_table, to_json, to_markdown

PARTS: dict[str, Callable[[Settings], list[Row]]] = {
    each.PART: each.measure
    for each in (
        steps,
        operations,
        allocator,
        memory,
        start,
        small,
        compiled,
        growth,
        alternatives,
        profiled,
        gpu,
    )
}
_DEFAULT = Settings()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    part: Annotated[str, typer.Option(help="Parts to run, separated by commas; all by default.")] = ",".join(PARTS),
    sizes: Annotated[str, typer.Option(help="Encoders as layers x hidden, separated by commas.")] = ",".join(
        size.name for size in _DEFAULT.sizes
    ),
    pairs: Annotated[int, typer.Option(min=2, help="Timed rounds of each comparison.")] = _DEFAULT.pairs,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed rounds before the timed ones.")] = _DEFAULT.warmup,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = _DEFAULT.batch,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = _DEFAULT.tokens,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 2)] = _DEFAULT.seed,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; by default, torch chooses.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for speed.json and speed.md.")] = Path("out/speed"),
) -> None:
    """Measure the cost of adapters, ours and PEFT's together."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        chosen = read_parts(part)
        settings = attrs.evolve(
            _DEFAULT, sizes=read_sizes(sizes), pairs=pairs, warmup=warmup, batch=batch, tokens=tokens, seed=seed
        )
    except ValueError as problem:
        print(f"benchmarks.speed: {problem}", file=sys.stderr)
        raise typer.Exit(2) from None
    measure_all(chosen, settings, out, Console())


def read_parts(text: str) -> list[str]:
    """Names of parts from "steps,memory". Raises `ValueError`, which lists the known parts, if one is unknown."""
    chosen = [name.strip() for name in text.split(",")]
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise ValueError(f"no part named {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    return chosen


def measure_all(chosen: Sequence[str], settings: Settings, out: Path, console: Console) -> list[Row]:
    """Run the parts one after the other. Results are written after each part, so a stopped run keeps them."""
    head = header(settings)
    rows: list[Row] = []
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        began = time.perf_counter()
        rows += PARTS[name](settings)
        console.print(f"{name}: {time.perf_counter() - began:.0f} s", highlight=False)
        (out / "speed.json").write_text(to_json(head, rows), encoding="utf-8")
        (out / "speed.md").write_text(to_markdown(head, rows), encoding="utf-8")
    show_limits(rows, console)
    return rows


def show_limits(rows: Sequence[Row], console: Console) -> None:
    """Print the limits; everything else is only in the files."""
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in limits_table(rows))
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    console.print(table)


if __name__ == "__main__":
    app()
