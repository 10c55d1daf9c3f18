"""The key figures at the top of a report."""

from collections.abc import Iterator

import attrs

from tunerkit_cli.report import scores, wording
from tunerkit_cli.report.html.tables import baseline_note
from tunerkit_cli.report.record import Run
from tunerkit_cli.report.verdict import trained_share


@attrs.frozen
class Fact:
    """A figure with its name, and a note below it."""

    name: str
    value: str
    note: str = ""


def facts(run: Run) -> tuple[Fact, ...]:
    """Return the key figures that the record has."""
    return (*_scores(run), *_sizes(run), *_effort(run))


def _scores(run: Run) -> Iterator[Fact]:
    metric = scores.main_metric(run.metrics, run.main_metric)
    if metric is not None:
        yield Fact(
            wording.capitalised(scores.title(metric)),
            wording.decimals(run.metrics[metric]),
            baseline_note(run, metric),
        )


def _sizes(run: Run) -> Iterator[Fact]:
    found, share = run.parameters, trained_share(run)
    if found.trained is not None:
        of = (
            f"{wording.percent(share)} of {wording.count(found.all)}"
            if share is not None and found.all is not None
            else ""
        )
        yield Fact("Trained parameters", wording.count(found.trained), of)
    budget = run.budget
    if budget is not None and budget.end is not None and budget.end != budget.start:
        notes = [f"{wording.number(budget.start)} at the start"] if budget.start is not None else []
        if budget.live is not None and budget.live != budget.end:
            notes.append(f"{wording.number(budget.live)} live")
        yield Fact(f"Budget ({budget.unit})", wording.number(budget.end), ", ".join(notes))
    elif run.ranks:
        low, high = min(run.ranks.values()), max(run.ranks.values())
        value = str(low) if low == high else f"{low} to {high}"
        yield Fact("Rank", value, f"in {len(run.ranks):,} matrices")


def _effort(run: Run) -> Iterator[Fact]:
    if "train" in run.rows:
        held_out = run.rows.get("eval")
        notes = [f"{held_out:,} held out" if held_out else "none held out"]
        if missing := sum(count for reasons in run.left_out.values() for count in reasons.values()):
            notes.append(f"{missing:,} left out")
        yield Fact("Training rows", f"{run.rows['train']:,}", ", ".join(notes))
    if run.steps is not None:
        epochs = max((row["epoch"] for row in run.logs if isinstance(row.get("epoch"), int | float)), default=None)
        yield Fact(
            "Optimizer steps",
            f"{run.steps:,}",
            f"{wording.number(epochs)} {'epoch' if epochs == 1 else 'epochs'}" if epochs else "",
        )
    if "train" in run.seconds:
        evaluated = run.seconds.get("evaluate")
        notes = [f"on {run.device}"] if run.device else []
        notes += [f"in {run.precision}"] if run.precision else []
        notes += [f"{wording.duration(evaluated)} to evaluate"] if evaluated is not None else []
        yield Fact("Training time", wording.duration(run.seconds["train"]), ", ".join(notes))
