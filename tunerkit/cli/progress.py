"""Progress bars that show loss, budget and mean rank."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tunerkit import Tuner
from tunerkit.cli.training import Step

# The loss of single batches is noisy, so the bar shows an exponential moving average with this decay.
SMOOTHING = 0.95


def watched(
    steps: Iterable[Step], total: int, *, console: Console, title: str, tuner: Tuner | None = None
) -> Iterator[Step]:
    """Yield ``steps`` unchanged and draw a progress bar. With a ``tuner``, it also shows budget and mean rank."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(title, total=total, facts="")
        average, ranks = None, _ranks(tuner)
        seen = 0
        for step in steps:
            average = step.loss if average is None else SMOOTHING * average + (1 - SMOOTHING) * step.loss
            if tuner is not None and len(tuner.history) != seen:  # counting ranks synchronises with the device
                seen, ranks = len(tuner.history), _ranks(tuner)
            progress.update(bar, completed=step.number, facts=f"loss {average:.3f}{ranks}")
            yield step


def _ranks(tuner: Tuner | None) -> str:
    if tuner is None:
        return ""
    ranks = list(tuner.ranks().values())
    return f"  budget {tuner.budget()}  rank {sum(ranks) / max(len(ranks), 1):.1f}"
