"""Whether a run learns: judged while it trains by its losses, and in the end by what it reaches on held-out rows."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Final

import attrs

from tunerkit_cli.report.record import Problem
from tunerkit_cli.tasks import EQUAL

# --- the training losses ---

# A training is judged by this many means of its losses, whatever it logs: a batch alone says little. It is what
# `logging_steps` gives by default. On the demo their standard deviation is 0.03.
POINTS: Final = 50
# With fewer points their noise cannot be told from a trend; with fewer than twice as many, where the level of guessing
# is not known, as there is noise in the start too.
FEWEST: Final = 8
# A loss is lost once this many points in a row are, a tenth of the training: spikes do not last so long.
RECENT: Final = 5
# A loss has fallen if it went below its start by this share of it. It is back if no more than this share of the fall is
# left. And a run is judged only if noise hides no more than this share of the start.
TENTH: Final = 0.1
# A fall is one by this many standard deviations of the noise, too: the deepest of fifty points of pure noise lies at
# 2.3, and an estimate from eight points may be half of the truth.
CLEAR: Final = 6.0
# Without a known level of guessing, a loss this far above its start is lost too: a training loss has no reason to rise.
# Held-out rows differ from training rows; a loss this much above the training's first one has another cause.
RISEN: Final = 0.25
# What has learned nothing is within this share of guessing in the last third of the training. Without a known level,
# the fall is below a hundredth of the start: language models' losses fall little.
NEAR: Final = 0.02
MOVED: Final = 0.01
# A run of fewer steps, three epochs of a thousand rows in batches of 32, is more likely to be too short than too fast.
FEW: Final = 100

# --- the held-out rows ---

# On fewer rows, one row more or less decides which of two shares is greater.
FEWEST_ROWS: Final = 30
# A model that finds a third of the rows of rarer classes misses five of five by chance in one of eight cases.
FEWEST_OTHERS: Final = 5
# Standard errors by which answers agree with the truth more often than they would by chance: one run in 700 by chance.
AGREES: Final = 3.0


@attrs.frozen
class Point:
    """The mean of some logged losses: up to ``step``, where the learning rate was ``rate``."""

    step: int
    loss: float
    rate: float | None


@attrs.frozen
class Change:
    """A loss that had fallen to ``low`` and is back at ``start``, or has only risen above it; ``now`` is the latest."""

    has_fallen: bool
    start: float
    low: Point
    now: float

    @property
    def goal(self) -> float:
        """A loss that is well below where it has gone back to: halfway down to where it was."""
        return (self.start + self.low.loss) / 2


def change(points: Sequence[Point], guess: float | None) -> Change | None:
    """Return how the loss is lost at the latest point: back at ``guess`` or its start; None if it is not, or noisy."""
    if not _are_enough(points, guess):
        return None
    losses = [point.loss for point in points]
    start = guess if guess is not None else _start(losses)
    size, least = abs(start), min(losses[-RECENT:])
    # Losses far above the start jump about, which is no noise of a run that learns.
    noise = CLEAR * _noise([min(loss, start + RISEN * size) for loss in losses])
    # Guessing's level is exact, so one point shows a fall; a start is itself noisy.
    width = 1 if guess is not None else 3
    lows = [median(losses[n : n + width]) for n in range(len(losses) - RECENT - width + 1)]
    low = min(lows)
    has_fallen = start - low >= max(TENTH * size, noise) and low < start
    if has_fallen:
        limit, point = start - TENTH * (start - low), attrs.evolve(points[lows.index(low)], loss=low)
    elif guess is None:
        limit, point = start + max(RISEN * size, noise), points[0]
    else:
        return None
    return Change(has_fallen, start, point, median(losses[-RECENT:])) if least > limit else None


def has_learned_nothing(points: Sequence[Point], guess: float | None) -> bool:
    """Whether the loss is in its last third where it was from the start; False if noise may hide that it is not."""
    if not _are_enough(points, guess):
        return False
    losses = [point.loss for point in points]
    part = max(RECENT, len(losses) // 3)
    noise = _noise(losses)
    end, error = median(losses[-part:]), 1.25 * noise / math.sqrt(part)  # a median's, where the noise is normal
    if guess is not None:
        return end >= (1 - NEAR) * guess and guess - end + 2 * error <= TENTH * guess
    start, hidden = _start(losses), 2 * (noise + error)
    return start - end + hidden < MOVED * abs(start) and hidden <= TENTH * abs(start)


def _are_enough(points: Sequence[Point], guess: float | None) -> bool:
    return len(points) >= (FEWEST if guess is not None else 2 * FEWEST)


def _start(losses: Sequence[float]) -> float:
    """The first loss, or that of the first three if the first was low by chance."""
    return max(losses[0], median(losses[:3]))


def _noise(losses: Sequence[float]) -> float:
    """The standard deviation of a point, by the differences of neighbours: of the later half, where that is noisier."""
    steps = [abs(after - before) for before, after in pairwise(losses)]
    return 1.4826 * max(median(steps), median(steps[len(steps) // 2 :])) / math.sqrt(2)


class Learning:
    """The losses of a run while it trains, and what is wrong with them; ``guess`` is that of frequencies alone.

    A loss that says nothing of whether the run learns is not judged (``judges``).
    """

    def __init__(
        self, guess: float | None, slower: str, usual: float, total_steps: int, *, judges: bool = True
    ) -> None:
        self.judges = judges
        self.guess = guess if guess is not None and 0 < guess < math.inf else None
        self.total, self.slower, self.usual = total_steps, slower, usual
        self.points: list[Point] = []
        self.problem: Problem | None = None
        self._lost: Change | None = None
        self._waiting: list[float] = []

    def add(self, entry: Mapping[str, Any]) -> str | None:
        """Take an entry of the trainer's logs. Return a sentence if the run has just been lost, or has recovered."""
        loss, step = entry.get("loss"), entry.get("step")
        if not self.judges or not isinstance(loss, int | float) or not math.isfinite(loss) or not isinstance(step, int):
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
            return f"this run has probably collapsed: {self.problem.text}; try {self.slower}"
        return None

    @property
    def advice(self) -> str:
        """What to try if the run does not learn: more steps, where they were few."""
        return self._longer(self.slower)

    def _longer(self, other: str) -> str:
        return other if self.total >= FEW else f"more steps than these {self.total}, as with --epochs; or {other}"

    def _collapsed(self, lost: Change) -> Problem:
        last = self.points[-1]
        if not lost.has_fallen:
            text = f"the loss has risen to {lost.now:.3g}, from {lost.start:.3g} at the start"
        else:
            where = "what guessing gives" if self.guess is not None else "where it began"
            text = f"the loss is back at {lost.now:.3g}, {where}, after {lost.low.loss:.3g} at step {lost.low.step}"
        rate = "" if last.rate is None else f", learning rate {last.rate:.3g}"
        text += f" (step {last.step} of {self.total}{rate})"
        return Problem("collapse", text, last.step, last.rate, self.slower)

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
        other = self._longer(f"--lr {self.usual:.2g}" if rate < self.usual / 2 else self.slower)
        other += f"{'' if self.total < FEW else ', or more epochs'}, and check that the labels fit the rows"
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
    """What is wrong by the held-out rows, and whether a run is better than guessing; None if nobody can say."""

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
    if EQUAL in metrics:
        text = f"all answers to each of {rows} held-out prompts have the same reward, which gives no direction"
        return _judged(EQUAL, text, metrics[EQUAL] < 1, rows, "a reward that tells more answers apart")
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
    """Whether a share of right answers is clearly above that of answers drawn at random, from the classes' shares."""
    # The variance for Cohen's kappa (Fleiss, Cohen and Everitt, 1969, equation 12): that of a share hides rare rows.
    both = [*zip(truth, answers, strict=True)]
    chance = sum(true * answered for true, answered in both)
    variance = chance + chance**2 - sum(true * answered * (true + answered) for true, answered in both)
    return right - chance > AGREES * math.sqrt(max(variance, 0.0) / rows)


def _label(labels: Sequence[str], number: int) -> str:
    return repr(labels[number]) if number < len(labels) else f"class {number}"


def below_baseline(
    metric: str, own: float, other: float, *, is_better_high: bool, advice: str, name: str = "head"
) -> Problem | None:
    """What is wrong if a run is worse than its "head" or its "base" alone; None if it is not."""
    if own == other or (own > other) == is_better_high:
        return None
    text = f"{metric} is {own:.4f}, and the {name} alone reaches {other:.4f}"
    return Problem(f"{name}_alone", text, advice=advice, fatal=False)


def judged(
    learning: Learning, found: Reached, held_out_loss: float | None, *, continued: bool = False
) -> tuple[Problem, ...]:
    """All that is wrong with a run that has ended: by its losses, and by held-out rows, which have the last word."""
    own = learning.at_the_end()
    if continued and learning.guess is None and own is not None and own.kind == "no_learning":
        own = None  # the loss of an adapter that is trained on may have nowhere left to fall
    if own is not None and found.has_learned:  # its best checkpoint may be loaded
        own = attrs.evolve(own, fatal=False) if own.kind == "collapse" else None
    problems = [*([own] if own is not None else []), *found.problems]
    if not problems and found.has_learned is None and held_out_loss is not None and learning.guess is None:
        is_known = _are_enough(learning.points, None)
        start = _start([point.loss for point in learning.points]) if is_known else math.inf
        if held_out_loss > start + RISEN * abs(start):
            text = f"the loss on held-out rows is {held_out_loss:.3g}, and the training's was {start:.3g} at the start"
            problems.append(Problem("held_out_loss", text, advice=learning.slower, fatal=False))
    return tuple(problems)
