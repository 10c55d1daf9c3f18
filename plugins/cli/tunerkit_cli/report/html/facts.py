"""What a page says of a run in few words: the key figures at the top, and its ranks."""

from collections.abc import Iterator, Mapping
from statistics import fmean

from tunerkit_cli.report import scores, wording
from tunerkit_cli.report.html.grids import MOST_CELLS, Grid, heatmap
from tunerkit_cli.report.record import Run
from tunerkit_cli.report.verdict import baseline_name


def facts(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield the key figures that the record has, each with its name and a note."""
    metric = scores.main_metric(run.metrics, run.main_metric)
    if metric is not None:
        note, value = "", run.metrics[metric]
        if run.baseline is not None and metric in run.baseline.metrics:
            difference = scores.signed(metric, value - run.baseline.metrics[metric])
            note = f"{difference} vs. {baseline_name(run.baseline.what)}"
        yield wording.capitalised(scores.title(metric)), wording.decimals(value), note
    found, budget = run.parameters, run.budget
    if found.trained is not None:
        of = "" if not found.all else f"{wording.percent(found.trained / found.all)} of {wording.count(found.all)}"
        yield "Trained parameters", wording.count(found.trained), of
    if budget is not None and budget.end is not None and budget.end != budget.start:
        notes = [f"{wording.number(budget.start)} at the start"] if budget.start is not None else []
        if budget.live is not None and budget.live != budget.end:
            notes.append(f"{wording.number(budget.live)} live")
        yield f"Budget ({budget.unit})", wording.number(budget.end), ", ".join(notes)
    elif run.ranks:
        low, high = min(run.ranks.values()), max(run.ranks.values())
        yield "Rank", str(low) if low == high else f"{low} to {high}", f"in {len(run.ranks):,} matrices"
    if "train" in run.rows:
        held_out = run.rows.get("eval")
        notes = [f"{held_out:,} held out" if held_out else "none held out"]
        if missing := sum(count for reasons in run.left_out.values() for count in reasons.values()):
            notes.append(f"{missing:,} left out")
        yield "Training rows", f"{run.rows['train']:,}", ", ".join(notes)
    if run.steps is not None:
        epochs = max((row["epoch"] for row in run.logs if isinstance(row.get("epoch"), int | float)), default=None)
        note = f"{wording.number(epochs)} {'epoch' if epochs == 1 else 'epochs'}" if epochs else ""
        yield "Optimizer steps", f"{run.steps:,}", note
    if "train" in run.seconds:
        evaluated = run.seconds.get("evaluate")
        notes = [f"on {run.device}"] if run.device else []
        notes += [f"in {run.precision}"] if run.precision else []
        notes += [f"{wording.duration(evaluated)} to evaluate"] if evaluated is not None else []
        yield "Training time", wording.duration(run.seconds["train"]), ", ".join(notes)


def parts(run: Run) -> str:
    """Say what the trained parameters belong to; empty if the record doesn't."""
    found = run.parameters
    named = {"adapters": found.adapters, "copies of modules": found.copies, "biases": found.biases}
    known = [f"{count:,} in {name}" for name, count in named.items() if count]
    return f"Trained parameters: {', '.join(known)}." if known else ""


def rank_summary(run: Run) -> str:
    """Say in a sentence how the ranks are distributed; empty without ranks."""
    if not run.ranks:
        return ""
    ranks = list(run.ranks.values())
    gone, full = ranks.count(0), capped(run)
    low, high = min(ranks), max(ranks)
    spread = f"{low} each" if low == high else f"{fmean(ranks):.1f} on average, from {low} to {high}"
    said = [f"{sum(ranks):,} live ranks in {len(ranks):,} matrices: {spread}"]
    said += [f"{full} at their cap"] if full else []
    said += [f"{gone} without any"] if gone else []
    said += [f"the first {MOST_CELLS:,} matrices are shown"] if len(ranks) > MOST_CELLS else []
    return f"{'; '.join(said)}."


def rank_heatmap(run: Run, highest: int | None = None) -> Grid | None:
    """Draw the ranks if they differ."""
    if len(set(run.ranks.values())) < 2:
        return None
    return heatmap(run.ranks, _telling_caps(run), highest=highest or highest_rank(run))


def highest_rank(run: Run) -> int:
    """Return the rank with the full colour: the greatest that a target has, had or may have."""
    had = (max(change.ranks, default=0) for change in run.history)
    return max((*run.ranks.values(), *(run.caps.get(path, 0) for path in run.ranks), *had), default=1) or 1


def capped(run: Run) -> int:
    """Return how many targets have the greatest rank that they may have."""
    return sum(0 < cap <= run.ranks[path] for path, cap in _telling_caps(run).items())


def _telling_caps(run: Run) -> Mapping[str, int]:
    """Return the caps of the targets; none if all have their greatest rank, as without a budget."""
    caps = {path: cap for path, cap in run.caps.items() if path in run.ranks}
    return {} if caps == run.ranks else caps
