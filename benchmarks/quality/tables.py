"""Tables from rows."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from benchmarks.quality import contest, methods
from benchmarks.quality.grids import BETWEEN, ENDS, LATER, Rows, rate_for
from benchmarks.quality.scores import Cell, Floats, at_rate, best, paired, percent_over, points_of, told
from benchmarks.quality.store import Row

HEADROOM = 1.0  # points between ranks 1 and 8; with less, a curve counts as flat
_RANKS = sorted((*ENDS, *BETWEEN))
_GRIDS = {"validation": "rates", "test": "contest"}  # the grid that scores each part
_LOSSES: tuple[Callable[[Row], float | None], ...] = (
    lambda row: row["test"]["loss"],
    lambda row: row["validation"]["loss"],
    lambda row: row["training_loss"],
)


def headroom_table(rows: Sequence[Row]) -> list[str]:
    """LoRA's validation accuracy by rank, and whether rank 8 is a point above rank 1 ("open" with one seed)."""
    lines = [
        f"| task | {' | '.join(f'r = {rank}' for rank in _RANKS)} | r = 8 − r = 1 | headroom |",
        f"|---|{'---:|' * (len(_RANKS) + 1)}---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = {
            rank: best(own)
            for rank in _RANKS
            if (own := [row for row in rows if (row["task"], row["rank"]) == (task, rank)])
        }
        shown = [_shown(cells[rank]) if rank in cells else "" for rank in _RANKS]
        if {1, 8} <= cells.keys():
            difference = paired(cells[8], cells[1])
            gain = float(difference.mean())
            if len(difference) > 1:
                shown += [told([difference]), "yes" if gain >= HEADROOM else "no"]
            else:
                shown += [f"{gain:+.2f}", "open"]
        else:
            shown += ["", ""]
        lines.append(_line(task, *shown))
    return lines


def compared_table(rows: Rows, rank: int, part: str = "test") -> list[str]:
    """AdaLoRA and LoRA at one size, and their differences by seed with the interval over all tasks.

    Test rows come from the contest, validation rows from the search for learning rates. At the lowest rank, whose tasks
    had been fixed, a second mean also includes tasks that were added later.
    """
    columns = (
        "AdaLoRA − LoRA, each at its own",
        "both at LoRA's",
        "both at AdaLoRA's",
        "PEFT's AdaLoRA − LoRA, both at LoRA's",
    )
    lines = [f"| task | LoRA (rate) | AdaLoRA (rate) | {' | '.join(columns)} |", f"|---|{'---:|' * 6}"]
    found: dict[str, list[Floats]] = {}
    for task in dict.fromkeys(row["task"] for row in rows.get(_GRIDS[part], ())):
        lora = cell_of(rows, task, methods.LORA, rank, part)
        ours = cell_of(rows, task, methods.ADALORA, rank, part)
        if lora is None or ours is None:
            continue
        pairs = (
            (ours, lora),
            (cell_of(rows, task, methods.ADALORA, rank, part, rate=lora.rate), lora),
            (ours, cell_of(rows, task, methods.LORA, rank, part, rate=ours.rate)),
            (cell_of(rows, task, methods.PEFT_ADALORA, rank, part, rate=lora.rate), lora),
        )
        found[task] = [_over(top, bottom) for top, bottom in pairs]
        lines.append(_line(task, _shown(lora), _shown(ours), *(told([over]) for over in found[task])))
    fixed = [over for task, over in found.items() if rank != contest.LOWEST or task not in LATER]
    means = {"mean of tasks": fixed}
    if len(fixed) < len(found):
        means["with those that came later"] = [*found.values()]
    return [*lines, *(_line(name, "", "", *_means(each, len(columns))) for name, each in means.items())]


def beside_table(rows: Rows, rank: int) -> list[str]:
    """AdaLoRA relative to LoRA, each at its best rate: accuracy and losses, means over the seeds that both have."""
    columns = ("test accuracy", "validation accuracy", "test loss, %", "validation loss, %", "training loss, %")
    lines = [f"| task | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for task in dict.fromkeys(row["task"] for row in rows.get("contest", ())):
        ours, theirs = (_at_its_rate(rows, task, method, rank) for method in (methods.ADALORA, methods.LORA))
        pairs = [(ours[seed], theirs[seed]) for seed in sorted({*ours} & {*theirs})]
        if not pairs:
            continue
        points = [
            np.mean([points_of(own, part) - points_of(lora, part) for own, lora in pairs])
            for part in ("test", "validation")
        ]
        losses = [np.mean([percent_over(loss(own), loss(lora)) for own, lora in pairs]) for loss in _LOSSES]
        lines.append(_line(task, *(f"{x:+.2f}" for x in points), *(f"{x:+.1f}" for x in losses)))
    return lines


def reference_table(rows: Rows) -> list[str]:
    """The other methods on test rows, each at its best rate and relative to LoRA of rank 1 on the same seeds."""
    columns = {
        "head alone": (methods.HEAD_ONLY, 0),
        "all weights": (methods.FULL, 0),
        "PEFT's AdaLoRA": (methods.PEFT_ADALORA, contest.LOWEST),
    }
    names = [*columns, *(f"{name} − LoRA" for name in columns)]
    lines = [f"| task | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    found: list[list[Floats]] = []
    for task in dict.fromkeys(row["task"] for row in rows.get("contest", ())):
        cells = [cell_of(rows, task, *column) for column in columns.values()]
        if not any(cells):
            continue
        lora = cell_of(rows, task, methods.LORA, contest.LOWEST)
        found.append([_over(cell, lora) for cell in cells])
        lines.append(_line(task, *(_shown(cell) for cell in cells), *(told([over]) for over in found[-1])))
    return [*lines, _line("mean of tasks", *[""] * len(columns), *_means(found, len(columns)))]


def generation_table(rows: Sequence[Row]) -> list[str]:
    """The language model on test rows, each method at each rate: token accuracy, loss, and points over LoRA."""
    columns = ("learning rate", "method", "accuracy", "loss", "accuracy − LoRA's")
    lines = [f"| {' | '.join(columns)} |", "|---:|---|---:|---:|---:|"]
    for rate in sorted({row["learning_rate"] for row in rows}):
        by_method = {
            method: [row for row in rows if (row["learning_rate"], row["method"]) == (rate, method)]
            for method in methods.NAMES
        }
        lora = at_rate(by_method[methods.LORA], rate)
        for method, name in methods.NAMES.items():
            cell = at_rate(by_method[method], rate)
            if cell is None:
                continue
            losses = [row["test"]["loss"] for row in by_method[method]]
            loss = "" if None in losses else f"{np.mean(losses):.4f}"
            over = "" if lora is None or method == methods.LORA else told([paired(cell, lora)])
            lines.append(_line(f"{rate:g}", name, f"{_mean(cell)} ({len(cell.seeds)})", loss, over))
    return lines


def cell_of(
    rows: Rows, task: str, method: str, rank: int, part: str = "test", *, rate: float | None = None
) -> Cell | None:
    """A method's scores on a part at ``rate``, by default its own best rate."""
    wanted = (task, method, rank)
    chosen = rate_for(*wanted, rows) if rate is None else rate
    if chosen is None:
        return None
    found = [row for row in rows.get(_GRIDS[part], ()) if (row["task"], row["method"], row["rank"]) == wanted]
    return at_rate(found, chosen, part)


def _at_its_rate(rows: Rows, task: str, method: str, rank: int) -> dict[int, Row]:
    """The contest's runs of a method at its best rate, by seed."""
    wanted = (task, method, rank, rate_for(task, method, rank, rows))
    return {
        row["seed"]: row
        for row in rows.get("contest", ())
        if (row["task"], row["method"], row["rank"], row["learning_rate"]) == wanted
    }


def _over(top: Cell | None, bottom: Cell | None) -> Floats:
    """The differences by seed; empty if one has not run yet, or if they share no seed."""
    return np.array([]) if top is None or bottom is None else paired(top, bottom)


def _means(by_task: Sequence[Sequence[Floats]], columns: int) -> Iterator[str]:
    """The mean of each column over the tasks. A mean of only some tasks says so, as it isn't comparable."""
    for column in range(columns):
        known = [over[column] for over in by_task if len(over[column])]
        yield told(known) + (f" ({len(known)} of {len(by_task)} tasks)" if 0 < len(known) < len(by_task) else "")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(cell: Cell | None) -> str:
    return "" if cell is None else f"{_mean(cell)} ({cell.rate:g}, {len(cell.seeds)})"


def _mean(cell: Cell) -> str:
    error = f" ± {cell.error:.2f}" if len(cell.seeds) > 1 else ""
    return f"{cell.mean:.2f}{error}"
