"""Whether a run learns: judged while it trains by its losses, and in the end by what it reaches on held-out rows."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Final, Literal

import attrs

from tunerkit_cli.report.record import Problem

# --- the training losses ---

# A training is judged by this many means of its losses, whatever it logs: a batch alone says little. It is what
# `logging_steps` gives by default. On the demo their standard deviation is 0.03.
POINTS: Final = 50
# With fewer points their noise cannot be told from a trend. Where the level of guessing is not known, there is noise in
# the start too: with eight points, one in a thousand curves that fall by 5 % with noise of 12 % seemed to rise.
FEWEST: Final = 8
FEWEST_UNKNOWN: Final = 15
# The latest loss is the median of these, or of the last three if that is lower: a spike of two points, 4 % of the
# training, does not move it. What it has fallen to lies before the last three.
RECENT: Final = 5
BACK: Final = 3
# A loss has fallen if it went below its start by this share of it, and by this many standard deviations of the noise.
# The deepest of fifty points of pure noise lies at 2.3, and an estimate from eight points may be half of the truth.
# The losses of a model that answers like a guess are alike whatever the rows are, and are noisy once it learns. So the
# noise is known too late, and a single point must lie deeper than the median of three.
FALLEN: Final = 0.1
DEEP: Final = 0.2
# Six points in a row at guessing's loss, or above it, make up for a fall of one point that is less deep: AdaLoRA's on
# the demo at four times its rate was to 0.578.
FLAT: Final = 6
NEARLY: Final = 0.03
CLEAR: Final = 6.0
LATEST: Final = 15
# Losses further than this share above the start are all lost. They jump about, which is no noise of a run that learns.
FAR: Final = 0.5
# It is back if this share of the fall is undone, and has recovered once no more than half is.
UNDONE: Final = 0.9
RECOVERED: Final = 0.5
# Without a known level of guessing, a loss this far above its start is lost too: a training loss has no reason to rise.
RISEN: Final = 0.25
# What has learned nothing is within this share of guessing in the last third of the training, and noise hides no more
# than a tenth. Without a known level, the fall is below a hundredth of the start: language models' losses fall little.
NEAR: Final = 0.02
HIDDEN: Final = 0.1
MOVED: Final = 0.01
_MEDIAN: Final = 1.25  # the standard error of a median, in those of a mean, where the noise is normal

# --- the held-out rows ---

# On fewer rows, one row more or less decides which of two shares is greater.
FEWEST_ROWS: Final = 30
# A model that finds a third of the rows of rarer classes misses five of five by chance in one of eight cases.
FEWEST_OTHERS: Final = 5
# Standard errors by which answers agree with the truth more often than they would by chance: one run in 700 by chance.
AGREES: Final = 3.0
# Held-out rows differ from training rows; a loss this much above the training's first one has another cause.
WORSE: Final = 0.25


@attrs.frozen
class Point:
    """The mean of some logged losses: up to ``step``, where the learning rate was ``rate``."""

    step: int
    loss: float
    rate: float | None


@attrs.frozen
class Change:
    """A loss that was ``low`` and is back at ``start``, or above it."""

    kind: Literal["back", "risen"]
    start: float
    low: Point
    now: float

    @property
    def goal(self) -> float:
        """A loss that is well below where it has gone back to."""
        return self.start - RECOVERED * (self.start - self.low.loss) if self.kind == "back" else self.start


def change(points: Sequence[Point], guess: float | None) -> Change | None:
    """Return how the loss is lost at the latest of the points; None if it is not, or cannot be told from noise.

    Args:
        points: The training's losses so far, the oldest first.
        guess: The loss of answering by the classes' frequencies alone, where it is known. A classifier that collapses
            goes there. Else the loss is compared with its start.
    """
    if not _are_enough(points, guess):
        return None
    losses = [point.loss for point in points]
    now = min(median(losses[-RECENT:]), median(losses[-BACK:]))
    start = guess if guess is not None else _start(losses)
    size, before = abs(start), losses[:-BACK]
    noise = CLEAR * _noise([min(loss, start + FAR * size) for loss in losses])
    lows = [(median(before[n : n + 3]), n, FALLEN) for n in range(len(before) - 2)]
    # Guessing's level is exact, so one point may show a fall; a start is itself noisy.
    if guess is not None:
        lows += [(loss, n, DEEP) for n, loss in enumerate(before)]
        if min(losses[-FLAT:]) >= (1 - NEARLY) * guess:
            lows += [(loss, n, FALLEN) for n, loss in enumerate(losses[:-FLAT])]
    fallen = [(low, n) for low, n, share in lows if start - low >= max(share * size, noise) and low < start]
    if fallen and now >= start - (1 - UNDONE) * (start - min(fallen)[0]):
        low, n = min(fallen)
        return Change("back", start, attrs.evolve(points[n], loss=low), now)
    if guess is None and now > start + max(RISEN * size, noise):
        return Change("risen", start, points[0], now)
    return None


def has_learned_nothing(points: Sequence[Point], guess: float | None) -> bool:
    """Whether the loss is in its last third where it was from the start; False if noise may hide that it is not."""
    if not _are_enough(points, guess):
        return False
    losses = [point.loss for point in points]
    part = max(RECENT, len(losses) // 3)
    noise = _noise(losses)
    end, error = median(losses[-part:]), _MEDIAN * noise / math.sqrt(part)
    if guess is not None:
        return end >= (1 - NEAR) * guess and guess - end + 2 * error <= HIDDEN * guess
    start, hidden = _start(losses), 2 * (noise + error)
    return start - end + hidden < MOVED * abs(start) and hidden <= HIDDEN * abs(start)


def _are_enough(points: Sequence[Point], guess: float | None) -> bool:
    return len(points) >= (FEWEST if guess is not None else FEWEST_UNKNOWN)


def _start(losses: Sequence[float]) -> float:
    """The first loss, or that of the first three if the first was low by chance."""
    return max(losses[0], median(losses[:3]))


def _noise(losses: Sequence[float]) -> float:
    """The standard deviation of a point, from the differences of neighbours: a trend and outliers hardly count.

    It is that of the latest points where they are noisier than all: a classifier's losses are quiet before it learns.
    """
    steps = [abs(after - before) for before, after in pairwise(losses)]
    return 1.4826 * max(median(steps), median(steps[-LATEST:])) / math.sqrt(2)


class Learning:
    """The losses of a run while it trains, and what is wrong with them.

    Attributes:
        guess: The loss of answering by frequencies alone, if it is known.
        advice: What to try if the run is lost.
        usual: The usual peak of the learning rate.
        points: The means of the losses so far.
        problem: What is wrong now; None if nothing is.
    """

    def __init__(self, guess: float | None, advice: str, usual: float, total_steps: int) -> None:
        self.guess = guess if guess is not None and 0 < guess < math.inf else None
        self.total, self.advice, self.usual = total_steps, advice, usual
        self.points: list[Point] = []
        self.problem: Problem | None = None
        self._lost: Change | None = None
        self._waiting: list[float] = []

    def add(self, entry: Mapping[str, Any]) -> str | None:
        """Take an entry of the trainer's logs. Return a sentence if the run has just been lost, or has recovered."""
        loss, step = entry.get("loss"), entry.get("step")
        if not isinstance(loss, int | float) or not math.isfinite(loss) or not isinstance(step, int):
            return None
        self._waiting.append(float(loss))
        if self.points and step - self.points[-1].step < self.total // POINTS:
            return None
        rate = entry.get("learning_rate")
        self.points.append(Point(step, fmean(self._waiting), rate if isinstance(rate, int | float) else None))
        self._waiting.clear()
        return self._judge()

    def _judge(self) -> str | None:
        if self._lost is not None and _latest(self.points) < self._lost.goal:
            self._lost = self.problem = None
            return f"the loss has fallen again: {_latest(self.points):.3g} at step {self.points[-1].step}"
        if self.problem is None and (lost := change(self.points, self.guess)) is not None:
            self._lost, self.problem = lost, self._collapsed(lost)
            return f"this run has probably collapsed: {self.problem.text}; try {self.advice}"
        return None

    def _collapsed(self, lost: Change) -> Problem:
        last = self.points[-1]
        if lost.kind == "risen":
            text = f"the loss has risen to {lost.now:.3g}, from {lost.start:.3g} at the start"
        else:
            where = "what guessing gives" if self.guess is not None else "where it began"
            text = f"the loss is back at {lost.now:.3g}, {where}, after {lost.low.loss:.3g} at step {lost.low.step}"
        rate = "" if last.rate is None else f", learning rate {last.rate:.3g}"
        text += f" (step {last.step} of {self.total}{rate})"
        return Problem("collapse", text, last.step, last.rate, self.advice)

    @property
    def good(self) -> int:
        """The last step whose loss was good: where the run has collapsed, well below where the loss is now."""
        goal = math.inf if self._lost is None else self._lost.goal
        return max((point.step for point in self.points if point.loss < goal), default=0)

    def at_the_end(self) -> Problem | None:
        """What is wrong with the losses of the whole training."""
        if self.problem is not None or not has_learned_nothing(self.points, self.guess):
            return self.problem
        end = _latest(self.points)
        text = f"the loss has not moved from its start: {end:.3g} at the end, {self.points[0].loss:.3g} at the start"
        if self.guess is not None:
            text = f"the loss is {end:.3g} at the end, and guessing gives {self.guess:.3g}: nothing was learned"
        rate = max(point.rate or 0.0 for point in self.points)
        # Whether the rate is too high or too low, such a loss does not say.
        other = f"--lr {self.usual:.2g}" if rate < self.usual / 2 else self.advice
        other += ", or more epochs, and check that the labels fit the rows"
        return Problem("no_learning", text, self.points[-1].step, rate, other)


def _latest(points: Sequence[Point]) -> float:
    return median(point.loss for point in points[-RECENT:])


def advice(rate: float, warmup: float, *, usual: float) -> str:
    """What to try where a run does not learn: half the peak learning rate or the usual one, or twice the warm-up."""
    longer = 2 * warmup if warmup else 0.1
    return f"--lr {min(rate / 2, usual):.2g}, or a longer warm-up with --set training.warmup_steps={longer:g}"


# --- what a run reaches on held-out rows ---


@attrs.frozen
class Reached:
    """What the held-out rows say of a run.

    Attributes:
        problems: What is wrong.
        has_learned: Whether it is better than guessing; None if nobody can say.
    """

    problems: tuple[Problem, ...] = ()
    has_learned: bool | None = None


def reached(
    metrics: Mapping[str, float],
    confusion: Sequence[Sequence[int]] | None,
    labels: Sequence[str],
    *,
    rows: int,
    advice: str,
) -> Reached:
    """Judge the metrics on ``rows`` held-out rows by those of an answer that needs no model."""
    if confusion is not None:
        return _of_classes(confusion, labels, advice)
    if "r2" in metrics:
        text = f"R² is {metrics['r2']:.4f} on {rows} held-out rows, and answering with their mean reaches 0"
        return _judged("mean", text, metrics["r2"] > 0, rows, advice)
    if "reward_accuracy" in metrics:
        text = f"the chosen answer has the greater reward in {metrics['reward_accuracy']:.4f} of {rows} held-out rows"
        text += ", and guessing reaches 0.5"
        return _judged("guessing", text, metrics["reward_accuracy"] > 0.5, rows, advice)
    if "exact" in metrics and "f1" in metrics:
        text = f"no label of {rows} held-out rows was found (micro F1 0)"
        return _judged("one_class", text, metrics["f1"] > 0, rows, advice)
    return Reached()


def _judged(kind: str, text: str, is_better: bool, rows: int, advice: str) -> Reached:
    """One measure, and whether it is better than that of an answer without a model."""
    if rows < FEWEST_ROWS:
        return Reached()
    return Reached(() if is_better else (Problem(kind, text, advice=advice),), has_learned=is_better)


def _of_classes(confusion: Sequence[Sequence[int]], labels: Sequence[str], advice: str) -> Reached:
    """Compare a classifier's answers with the most frequent class alone, and with what would agree by chance."""
    truth = [sum(row) for row in confusion]
    answers = [sum(column) for column in zip(*confusion, strict=True)]
    rows, most = sum(truth), max(truth, default=0)
    if not rows:
        return Reached()
    right = sum(row[n] for n, row in enumerate(confusion)) / rows
    known = f"accuracy {right:.4f}; always answering {_label(labels, truth.index(most))} reaches {most / rows:.4f}"
    only = answers.index(rows) if rows in answers else None
    if only is not None and rows - truth[only] >= FEWEST_OTHERS:
        text = f"all {rows} held-out rows are predicted as {_label(labels, only)} ({known})"
        return Reached((Problem("one_class", text, advice=advice),), has_learned=False)
    agrees = _agrees(right, [count / rows for count in truth], [count / rows for count in answers], rows)
    if rows < FEWEST_ROWS or right > most / rows or (agrees and right == most / rows):
        return Reached(has_learned=True if agrees and rows >= FEWEST_ROWS else None)
    text = f"the answers on {rows} held-out rows are not better than one class alone ({known})"
    return Reached((Problem("majority", text, advice=advice, fatal=not agrees),), has_learned=agrees)


def _agrees(right: float, truth: Sequence[float], answers: Sequence[float], rows: int) -> bool:
    """Whether a share of right answers is clearly above that of answers drawn at random, from the classes' shares.

    Its variance is the one for Cohen's kappa (Fleiss, Cohen and Everitt, 1969, equation 12): the obvious one, of a
    share, hides five rare rows found among ten.
    """
    both = [*zip(truth, answers, strict=True)]
    chance = sum(true * answered for true, answered in both)
    variance = chance + chance**2 - sum(true * answered * (true + answered) for true, answered in both)
    return right - chance > AGREES * math.sqrt(max(variance, 0.0) / rows)


def _label(labels: Sequence[str], number: int) -> str:
    return repr(labels[number]) if number < len(labels) else f"class {number}"


def below_baseline(metric: str, own: float, other: float, *, is_better_high: bool, advice: str) -> Problem | None:
    """What is wrong if a run is worse than the head alone; None if it is not."""
    if own == other or (own > other) == is_better_high:
        return None
    text = f"{metric} is {own:.4f}, and the head alone reaches {other:.4f}"
    return Problem("head_alone", text, advice=advice, fatal=False)


def judged(
    learning: Learning, found: Reached, held_out_loss: float | None, *, continued: bool = False
) -> tuple[Problem, ...]:
    """All that is wrong with a run that has ended: by its losses, and by its held-out rows, which have the last word.

    A run that is better than guessing has learned, whatever its last losses are: its best checkpoint may be loaded. The
    loss of a run that goes on from an adapter (``continued``) may have nowhere left to fall.
    """
    own = learning.at_the_end()
    if continued and learning.guess is None and own is not None and own.kind == "no_learning":
        own = None
    if own is not None and found.has_learned:
        own = attrs.evolve(own, fatal=False) if own.kind == "collapse" else None
    problems = [*([own] if own is not None else []), *found.problems]
    if not problems and found.has_learned is None and held_out_loss is not None and learning.guess is None:
        is_known = _are_enough(learning.points, None)
        start = _start([point.loss for point in learning.points]) if is_known else math.inf
        if held_out_loss > start + WORSE * abs(start):
            text = f"the loss on held-out rows is {held_out_loss:.3g}, and the training's was {start:.3g} at the start"
            problems.append(Problem("held_out_loss", text, advice=learning.advice, fatal=False))
    return tuple(problems)
