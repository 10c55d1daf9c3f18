"""The command ``python -m benchmarks.quality``."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout
from rich.console import Console

from benchmarks.quality import store
from benchmarks.quality.ablation import SEEDS, ablation_table
from benchmarks.quality.collapse import collapse_table, default_table
from benchmarks.quality.contest import LOWEST, USUAL
from benchmarks.quality.grids import ALSO_MADE, COMPARED, GRIDS, HEADROOM, LATER
from benchmarks.quality.methods import ADALORA, LORA, PEFT_LORA
from benchmarks.quality.packages import cache_folder
from benchmarks.quality.parity import losses
from benchmarks.quality.plots import draw_map, draw_rates, draw_sizes
from benchmarks.quality.pool import make
from benchmarks.quality.runs import Run
from benchmarks.quality.tables import beside_table, compared_table, generation_table, headroom_table, reference_table
from benchmarks.quality.tasks import TASKS, digest

_MINUTES = 2  # of one core per run: the median of the existing rows, rounded up
ROWS = Path(__file__).parent / "rows"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    grid: Annotated[str, typer.Option(help=f"Which runs: {', '.join(GRIDS)}.")],
    task: Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs in parallel, one thread each.")] = 2,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many runs in this call.")] = None,
    rows: Annotated[Path, typer.Option(help="The folder of rows.")] = ROWS,
) -> None:
    """Execute the runs of a grid that have no row yet, and the runs that depend on them. A second call resumes."""
    rows.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(rows / f"{grid}.lock", timeout=0):
            _run(grid, task, jobs, limit, rows)
    except Timeout:
        print(f"benchmarks.quality: grid {grid!r} is being run already, into {rows}", file=sys.stderr)
        raise typer.Exit(2) from None
    except ValueError as problem:
        print(f"benchmarks.quality: {problem}", file=sys.stderr)
        raise typer.Exit(2) from None


def _run(grid: str, task: str | None, jobs: int, limit: int | None, rows: Path) -> None:
    console = Console()
    while limit is None or limit > 0:
        left = unmade(grid, task, store.read_all(rows))[:limit]
        if not left:
            break
        cost = f"about {len(left) * _MINUTES / 60:.1f} hours of one core"
        console.print(f"{grid}: {len(left)} runs next, {cost}", highlight=False)
        make(left, rows / f"{grid}.jsonl", jobs, console)
        limit = None if limit is None else limit - len(left)


def unmade(grid: str, task: str | None, rows: Mapping[str, Sequence[store.Row]]) -> list[Run]:
    """The next runs of a grid that have no row yet, for some tasks or all. ``rows`` maps a grid to its rows.

    Raises `ValueError`, which lists the known names, if the grid or a task is unknown.
    """
    if grid not in GRIDS:
        raise ValueError(f"no grid named {grid!r}; there are: {', '.join(GRIDS)}")
    names = list(TASKS) if task is None else [name.strip() for name in task.split(",")]
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"no task named {', '.join(unknown)}; there are: {', '.join(TASKS)}")
    done = {row["key"] for name in (grid, *ALSO_MADE.get(grid, ())) for row in rows.get(name, ())}
    return [each for each in GRIDS[grid](rows) if each.task in names and each.key not in done]


@app.command()
def tables(rows: Annotated[Path, typer.Option(help="The folder of rows.")] = ROWS) -> None:
    """Print every table that the existing rows allow, and how long the runs took."""
    found = store.read_all(rows)
    margin = [row for name in ("collapse", *ALSO_MADE["collapse"]) for row in found.get(name, ())]
    shown = {
        "headroom": headroom_table(found.get("headroom", ())),
        **{f"ablation, seed {seed}": ablation_table(_of_seed(found.get("ablation", ()), seed)) for seed in SEEDS},
        "headroom, all in fp32": headroom_table([row for row in found.get("rates", ()) if row["method"] == LORA]),
        **{f"rates, rank {rank}": compared_table(found, rank, "validation") for rank in (LOWEST, USUAL)},
        **{f"contest, rank {rank}": compared_table(found, rank) for rank in (LOWEST, USUAL)},
        **{f"contest, rank {rank}, losses": beside_table(found, rank) for rank in (LOWEST, USUAL)},
        "contest, others": reference_table(found),
        "generation": generation_table(found.get("generation", ())),
        "collapse": collapse_table(margin) if "collapse" in found else [],
        "default": default_table(margin, COMPARED) if "collapse" in found else [],
    }
    for name, lines in shown.items():
        print("\n".join([f"{name}\n", *lines, ""]))
    for name, made in found.items():
        print(f"{name}: {len(made)} runs, {sum(row['seconds']['all'] for row in made) / 3600:.2f} hours of one core")


def _of_seed(rows: Sequence[store.Row], seed: int) -> list[store.Row]:
    return [row for row in rows if row["seed"] == seed]


@app.command()
def plots(
    out: Annotated[Path, typer.Option(help="The folder for the plots.")] = Path("out/quality"),
    rows: Annotated[Path, typer.Option(help="The folder of rows.")] = ROWS,
) -> None:
    """Plot accuracy over size and over learning rate, and the ranks of AdaLoRA's first run on each contest task."""
    found = store.read_all(rows)
    pictures = {
        "sizes": draw_sizes(COMPARED, found),
        f"rates-{LOWEST}": draw_rates((*HEADROOM, *LATER), found, rank=LOWEST),
        f"rates-{USUAL}": draw_rates(COMPARED, found, rank=USUAL),
    }
    firsts = {(row["task"], row["rank"]): row for row in reversed(found.get("contest", ())) if row["method"] == ADALORA}
    pictures |= {f"ranks-{task.replace('/', '-')}-{rank}": draw_map(row) for (task, rank), row in firsts.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.png", dpi=100)
        print(out / f"{name}.png")


@app.command()
def parity(
    task: Annotated[str, typer.Option(help="The task to train on.")] = "movie-2",
    rank: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: Annotated[float, typer.Option()] = 2e-3,
    steps: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Train our LoRA and PEFT's from the same start on the same batches, and print how far their losses differ."""
    found = losses(task, rank=rank, learning_rate=learning_rate, steps=steps, cache=cache_folder())
    theirs, ours = found[PEFT_LORA], found[LORA]
    apart = max(abs(one - other) for one, other in zip(theirs, ours, strict=True))
    print(f"{task}, rank {rank}, {learning_rate:g}: losses of {len(ours)} steps differ by at most {apart:.2e}")
    print(f"first {theirs[0]:.4f} {ours[0]:.4f}, last {theirs[-1]:.4f} {ours[-1]:.4f} (PEFT's, ours)")


@app.command()
def splits() -> None:
    """Print the size and digest of each part of each task, to detect a split that changed."""
    for name, each in TASKS.items():
        parts = each.cut(cache_folder())
        print(f"| {name} | {each.steps} | {' | '.join(f'{len(part)} `{digest(part)}`' for part in parts)} |")


if __name__ == "__main__":
    app()
