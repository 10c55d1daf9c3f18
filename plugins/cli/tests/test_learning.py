"""Whether a run learns: silent on every curve of a run that does, and heard on those that do not."""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.nn import functional

from tunerkit_cli.report.record import Problem
from tunerkit_cli.tasks import task_of
from tunerkit_cli.watching.learning import (
    FEW,
    FEWEST,
    FEWEST_OTHERS,
    FEWEST_ROWS,
    POINTS,
    RECENT,
    Learning,
    Reached,
    advice,
    below_baseline,
    judged,
    reached,
)

seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(3, 120)


def heard(losses: Sequence[float], guess: float | None, *, every: int = 8) -> tuple[list[tuple[int, str]], Learning]:
    """What is said of losses that are logged every few steps, by the number of the loss, and the state at the end."""
    learning = Learning(guess, "less", 1e-3, every * len(losses))
    said = []
    for number, loss in enumerate(losses):
        entry = {"step": every * (number + 1), "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0}
        if (sentence := learning.add(entry)) is not None:
            said.append((number, sentence))
    return said, learning


def falling(start: float, floor: float, pace: float, noise: float, count: int, seed: int) -> list[float]:
    """Losses that fall exponentially from ``start`` to ``floor``, with normal noise of that share of their value."""
    chance = random.Random(seed)
    clean = (floor + (start - floor) * math.exp(-pace * number / count) for number in range(count))
    return [value * max(1 + noise * chance.gauss(0, 1), 0.05) for value in clean]


# --- curves of runs that learn: never a word ---


@given(
    guess=st.floats(0.3, 3.0),
    head=st.floats(1.0, 1.5),
    floor=st.floats(0.0, 0.85),
    pace=st.floats(4, 60),
    noise=st.floats(0, 0.15),
    count=lengths,
    seed=seeds,
)
def test_a_classifier_that_learns_is_let_alone(
    guess: float, head: float, floor: float, pace: float, noise: float, count: int, seed: int
) -> None:
    """Fast or slow, to 85 % of guessing's loss or to 0, with noise of up to 15 %, in three log entries or 120."""
    said, learning = heard(falling(head * guess, floor * guess, pace, noise, count, seed), guess)
    assert said == []
    assert learning.at_the_end() is None


@given(
    start=st.floats(0.5, 12),
    fall=st.floats(0.03, 0.9),
    pace=st.floats(3, 40),
    noise=st.floats(0, 0.15),
    count=lengths,
    seed=seeds,
)
def test_a_language_model_that_learns_little_is_let_alone(
    start: float, fall: float, pace: float, noise: float, count: int, seed: int
) -> None:
    """Its loss may fall by 3 % with noise of 15 %: no level of guessing is known, and the start is noisy."""
    said, learning = heard(falling(start, (1 - fall) * start, pace, noise, count, seed), None)
    assert said == []
    assert learning.at_the_end() is None


@given(
    rows=st.integers(16, 256),
    margin=st.floats(0.7, 4),
    spread=st.floats(0.1, 1.2),
    pace=st.floats(4, 40),
    count=lengths,
    seed=seeds,
)
def test_a_classifier_whose_losses_are_noisy_once_it_learns_is_let_alone(
    rows: int, margin: float, spread: float, pace: float, count: int, seed: int
) -> None:
    """Logistic losses of so many rows a point: at the start they are all log 2, and later some rows are far off."""
    generator = numpy.random.default_rng(seed)
    reached = margin * (1 - numpy.exp(-pace * numpy.arange(count) / count))[:, None]
    margins = generator.normal(reached, spread * reached, (count, rows))
    said, learning = heard(numpy.logaddexp(0, -margins).mean(1).tolist(), math.log(2))
    assert said == []
    assert learning.at_the_end() is None


@given(variance=st.floats(1e-3, 1e6), offset=st.floats(0, 100), floor=st.floats(0, 0.7), count=lengths, seed=seeds)
def test_a_regression_that_learns_is_let_alone(
    variance: float, offset: float, floor: float, count: int, seed: int
) -> None:
    """Squared errors of 64 rows are noisy and skewed, and the first may be far above the labels' variance."""
    chance = random.Random(seed)
    clean = falling(variance * (1 + offset), floor * variance, 60, 0, count, seed)
    losses = [value * sum(chance.gauss(0, 1) ** 2 for _ in range(64)) / 64 for value in clean]
    said, learning = heard(losses, variance)
    assert said == []
    assert learning.at_the_end() is None


@given(
    guess=st.sampled_from([None, math.log(2)]),
    places=st.lists(st.integers(0, 60), max_size=4),
    height=st.floats(1, 20),
    noise=st.floats(0, 0.05),
    seed=seeds,
)
def test_spikes_that_recover_are_let_alone(
    guess: float | None, places: list[int], height: float, noise: float, seed: int
) -> None:
    """Two entries of fifty, to 20 times the start, as often as they come."""
    losses = falling(0.7, 0.35, 12, noise, 50, seed)
    spikes = [place for n, place in enumerate(sorted(places)) if all(abs(place - p) > 6 for p in sorted(places)[:n])]
    for place in spikes:
        for number in range(place, min(place + 2, len(losses))):
            losses[number] = 0.7 * height
    said, learning = heard(losses, guess)
    assert said == []
    assert learning.at_the_end() is None


@given(st.lists(st.floats(0, 1e6), max_size=FEWEST - 1), st.sampled_from([None, 0.7]))
def test_of_a_few_steps_nothing_is_said(losses: list[float], guess: float | None) -> None:
    """Six steps tell nothing, whatever their losses are."""
    said, learning = heard(losses, guess, every=1)
    assert said == []
    assert learning.at_the_end() is None


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=80), st.sampled_from([None, 0.0, 0.7, math.inf])
)
def test_any_losses_are_judged(losses: list[float], guess: float | None) -> None:
    """Negative ones, infinite ones, and labels that are all the same: there is no error, and losses of 0 are fine."""
    heard(losses, guess)[1].at_the_end()
    assert heard([0.0] * 20, guess)[1].at_the_end() is None or guess is None


# --- curves of runs that do not learn: said once, at once ---


@given(
    guess=st.sampled_from([math.log(2), math.log(10), 0.4]),
    low=st.floats(0.2, 0.75),
    at=st.integers(9, 40),
    noise=st.floats(0, 0.02),
    seed=seeds,
)
def test_a_collapse_is_said_once_within_five_entries(
    guess: float, low: float, at: int, noise: float, seed: int
) -> None:
    """From 0.69 to 0.45 and then 0.693 for the rest: the step and the rate are named, and the end remembers it."""
    fallen = falling(guess, low * guess, 10, noise, at, seed)
    assume(min(fallen) < 0.8 * guess)
    rest = falling(guess, guess, 1, noise / 4, 50 - at, seed + 1)
    said, learning = heard([*fallen, *rest], guess)
    ((number, sentence),) = said
    assert at <= number < at + RECENT
    problem = learning.at_the_end()
    assert problem is not None
    assert (problem.kind, problem.step, problem.learning_rate) == ("collapse", 8 * (number + 1), 1e-3)
    assert sentence == f"this run has probably collapsed: {problem.text}; try less"
    assert f"step {problem.step} of 400, learning rate 0.001" in problem.text


@pytest.mark.parametrize("guess", [math.log(2), None])
def test_a_loss_that_jumps_about_far_above_its_start_is_said_to_collapse(guess: float | None) -> None:
    """The losses of a real run whose rate jumped: how much they jump about is no noise of a run that learns."""
    learned = [0.692, 0.69, 0.68, 0.65, 0.6, 0.52, 0.444, 0.3, 0.2, 0.136, 0.2, 0.312, 0.25, 0.2, 0.151, 0.15]
    jumping = [6.78, 16.0, 3.53, 9.1, 1.36, 4.2, 2.34, 1.9]
    ((number, _),), learning = heard([*learned, *jumping], guess)
    assert len(learned) < number < len(learned) + RECENT
    assert learning.problem is not None


def test_the_demo_at_four_times_its_rate_is_said_to_collapse() -> None:
    """The losses of a real run: one entry lies below guessing's 0.693, and five are back there when it is said."""
    real = [0.692, 0.692, 0.683, 0.545, 0.696, 0.702, 0.691, 0.693, 0.697, 0.693, 0.695, 0.695, 0.692, 0.693, 0.695]
    ((number, sentence),), _ = heard(real, math.log(2))
    assert number == 8
    assert (
        "back at 0.696, what guessing gives, after 0.545 at step 32 (step 72 of 120, learning rate 0.001)" in sentence
    )


def test_a_shallow_fall_is_said_once_the_loss_has_stayed_at_guessing() -> None:
    """AdaLoRA's losses on the demo at four times its rate: one entry is 17 % below, and five in a row are back."""
    real = [0.692, 0.692, 0.681, 0.578, 0.672, 0.66, 0.68, 0.671, 0.687, 0.7, 0.693, 0.693, 0.691, 0.694, 0.693, 0.694]
    ((number, sentence),), _ = heard(real, math.log(2))
    assert number == 12
    assert "after 0.578 at step 32" in sentence


@given(
    start=st.floats(1, 10),
    at=st.integers(2 * FEWEST, 40),
    fall=st.floats(0.3, 0.9),
    rise=st.floats(1.0, 5.0),
    seed=seeds,
)
def test_a_language_model_whose_loss_goes_back_or_rises_is_said_to_collapse(
    start: float, at: int, fall: float, rise: float, seed: int
) -> None:
    """Back at its start after a clear fall, or above it."""
    fallen = falling(start, (1 - fall) * start, 10, 0.01, at, seed)
    rest = falling(rise * start, rise * start, 1, 0.01, 50 - at, seed + 1)
    said, learning = heard([*fallen, *[max(value, 1.01 * start) for value in rest]], None)
    assert len(said) == 1
    assert at <= said[0][0] < at + RECENT
    assert learning.at_the_end() is not None


@given(rise=st.floats(1.6, 10), noise=st.floats(0, 0.03), seed=seeds)
def test_a_loss_that_only_rises_is_said_to_collapse(rise: float, noise: float, seed: int) -> None:
    """It never fell, so it is compared with its start."""
    said, learning = heard(falling(2.0, 2.0 * rise, 12, noise, 50, seed), None)
    assert len(said) == 1
    assert "has risen" in said[0][1]
    assert learning.at_the_end() is not None


@given(guess=st.floats(0.3, 3), noise=st.floats(0, 0.008), count=st.integers(FEWEST, 100), seed=seeds)
def test_a_classifier_that_stays_at_guessing_has_learned_nothing(
    guess: float, noise: float, count: int, seed: int
) -> None:
    """Which is known at the end alone."""
    said, learning = heard(falling(1.2 * guess, guess, 60, noise, count, seed), guess)
    found = learning.at_the_end()
    assert found is not None
    assert said == [] or found.kind == "collapse"


def test_a_loss_that_does_not_move_has_learned_nothing() -> None:
    """Without a known level: it falls by less than a hundredth, and the noise is less than that."""
    flat, moved = (heard(falling(2.0, 2.0 * end, 3, 0.002, 50, 0), None)[1].at_the_end() for end in (1.0, 0.95))
    assert moved is None
    assert flat is not None
    assert flat.kind == "no_learning"
    assert flat.text == "the loss has not moved from its start: 2 at the end, 2 at the start"


@pytest.mark.parametrize(("usual", "tried"), [(1e-3, "less"), (1e-2, "--lr 0.01")])
def test_of_a_run_that_learned_nothing_a_rate_below_the_usual_one_is_raised(usual: float, tried: str) -> None:
    """Whether the rate was too high or too low, the loss itself does not say."""
    learning = Learning(math.log(2), "less", usual, 400)
    for number in range(50):
        learning.add({"step": 8 * (number + 1), "loss": 0.69, "learning_rate": 1e-3})
    found = learning.at_the_end()
    assert found is not None
    assert found.advice == f"{tried}, or more epochs, and check that the labels fit the rows"


def test_where_steps_were_few_more_of_them_are_the_first_advice() -> None:
    """Whatever shows that nothing was learned; not where the loss was lost, which more steps do not mend."""
    learning = Learning(math.log(2), "less", 1e-3, FEW - 1)
    for number in range(20):
        learning.add({"step": number + 1, "loss": 0.69, "learning_rate": 1e-3})
    found = learning.at_the_end()
    assert found is not None
    first = "more steps than these 99, as with --epochs; or less"
    assert found.advice == f"{first}, and check that the labels fit the rows"
    assert learning.advice == first
    assert Learning(None, "less", 1e-3, FEW).advice == "less"
    losses = [0.69] * 3 + [0.4] * 6 + [0.69] * 6
    (said,) = filter(None, (learning.add({"step": 21 + n, "loss": loss}) for n, loss in enumerate(losses)))
    assert said.endswith("; try less")


def test_a_loss_that_falls_again_has_recovered() -> None:
    """Both are said, nothing is left at the end, and a second collapse is said again."""
    lost = [*[0.69] * 3, *[0.4] * 10, *[0.69] * 8]
    said, learning = heard([*lost, *[0.4] * 10], math.log(2))
    assert [number for number, _ in said] == [17, 23]
    assert said[1][1] == "the loss has fallen again: 0.4 at step 192"
    assert learning.at_the_end() is None
    assert [number for number, _ in heard([*lost, *[0.4] * 10, *[0.69] * 8], math.log(2))[0]] == [17, 23, 35]
    assert [number for number, _ in heard([*lost, *[0.6] * 10], math.log(2))[0]] == [17]  # not half of the way


def test_a_classifier_that_learned_a_little_has_learned() -> None:
    """Its loss ends 5 % below guessing's, which is no noise."""
    assert heard(falling(0.7, 0.95 * math.log(2), 12, 0.001, 50, 0), math.log(2))[1].at_the_end() is None


# --- how losses are logged makes no difference ---


@given(st.integers(0, 60), seeds)
def test_a_resumed_run_is_judged_as_one_that_was_not_interrupted(cut: int, seed: int) -> None:
    """The entries before the interruption come from the checkpoint, all at once."""
    losses = [*falling(0.7, 0.4, 10, 0.02, 30, seed), *falling(0.7, 0.7, 1, 0.005, 30, seed)]
    whole = Learning(math.log(2), "less", 1e-3, 480)
    entries = [{"step": 8 * (n + 1), "loss": loss, "learning_rate": 1e-3} for n, loss in enumerate(losses)]
    for entry in entries:
        whole.add(entry)
    resumed = Learning(math.log(2), "less", 1e-3, 480)
    for entry in [*entries[:cut], *entries[cut:]]:
        resumed.add({**entry, "epoch": 1.0})
    assert resumed.points == whole.points
    assert resumed.at_the_end() == whole.at_the_end() is not None


@given(st.integers(1, 200), st.integers(1, 5000))
def test_any_number_of_log_entries_makes_at_most_fifty_points(every: int, count: int) -> None:
    """A loss for each of 5,000 steps is judged as quickly as fifty, and no loss counts twice."""
    total = every * count
    learning = Learning(None, "less", 1e-3, total)
    for number in range(count):
        learning.add({"step": every * (number + 1), "loss": float(number)})
    assert min(count, POINTS // 2) <= len(learning.points) <= POINTS + POINTS // 2 or count < POINTS * 2
    assert [point.loss for point in learning.points] == sorted(point.loss for point in learning.points)


# --- the loss of answering without a model ---

rows_of_classes = st.lists(st.sampled_from("abc"), min_size=1, max_size=40)


@given(rows_of_classes)
def test_the_loss_of_guessing_classes_is_that_of_their_frequencies(names: list[str]) -> None:
    """As torch computes it, of logits that are the logarithms of the frequencies."""
    found = task_of("text-classification", None).guess_loss([{"text": "x", "label": name} for name in names])
    numbers = torch.tensor(["abc".index(name) for name in names])
    logits = torch.bincount(numbers, minlength=3).div(len(names)).log().expand(len(names), 3)
    assert found == pytest.approx(float(functional.cross_entropy(logits, numbers)), abs=1e-6)


@given(st.lists(st.lists(st.sampled_from("abc"), unique=True), min_size=1, max_size=40).filter(any))
def test_the_loss_of_guessing_labels_is_that_of_their_frequencies(names: list[list[str]]) -> None:
    """As torch computes it, over the labels that there are."""
    found = task_of("multi-label", None).guess_loss([{"text": "x", "label": each} for each in names])
    known = sorted({name for each in names for name in each})
    truth = torch.tensor([[float(name in each) for name in known] for each in names])
    shares = truth.mean(0).expand_as(truth)
    assert found == pytest.approx(float(functional.binary_cross_entropy(shares, truth)), abs=1e-6)


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=40))
def test_the_loss_of_guessing_numbers_is_their_variance(numbers: list[float]) -> None:
    """Numbers whose squares are infinite have an infinite one, without a warning, and it is left alone."""
    found = task_of("regression", None).guess_loss([{"text": "x", "label": number} for number in numbers])
    assert found is not None
    with numpy.errstate(all="ignore"):
        assert found == pytest.approx(float(numpy.var(numbers)), rel=1e-6, nan_ok=True)
    heard([1.0] * 20, found)


@pytest.mark.parametrize("name", ["causal-lm", "seq2seq", "preference"])
def test_language_models_have_no_loss_of_guessing(name: str) -> None:
    """Nobody knows what guessing gives."""
    assert task_of(name, None).guess_loss([{"source": "a", "target": "b"}]) is None


# --- the held-out rows ---


def answers(confusion: Sequence[Sequence[int]]) -> Reached:
    rows = sum(map(sum, confusion))
    return reached({"accuracy": 0.0}, confusion, ["neg", "pos"], rows=rows, advice="less")


def test_one_class_for_all_rows_is_named_with_the_most_frequent_one() -> None:
    """As the demo's run that collapsed."""
    found = answers([[0, 1532], [0, 1468]])
    (problem,) = found.problems
    assert found.has_learned is False
    assert (problem.kind, problem.fatal, problem.advice) == ("one_class", True, "less")
    assert problem.text == (
        "all 3000 held-out rows are predicted as 'pos' (accuracy 0.4893; always answering 'neg' reaches 0.5107)"
    )


@given(st.integers(0, 200), st.integers(0, 200))
def test_one_class_is_right_where_the_rows_have_hardly_another(common: int, others: int) -> None:
    """A good classifier may miss four rare rows; five are too many to be chance."""
    found = answers([[common, 0], [others, 0]])
    assert FEWEST_OTHERS == 5
    assert ("one_class" in [problem.kind for problem in found.problems]) == (others >= FEWEST_OTHERS)


def test_an_accuracy_below_the_most_frequent_class_is_said() -> None:
    """It is fatal if the answers agree with the truth no more than by chance; else the metric may be the wrong one."""
    (guessing,) = answers([[1000, 500], [330, 170]]).problems
    assert (guessing.kind, guessing.fatal) == ("majority", True)
    (rare,) = answers([[930, 60], [5, 5]]).problems
    assert (rare.kind, rare.fatal) == ("majority", False)
    assert answers([[930, 60], [5, 5]]).has_learned is True
    assert answers([[1268, 227], [218, 1287]]) == Reached(has_learned=True)


@given(st.integers(1, FEWEST_ROWS - 1), seeds)
def test_few_rows_say_nothing_of_an_accuracy(rows: int, seed: int) -> None:
    """One row more or less would decide; only one class for all of them is said."""
    chance = random.Random(seed)
    confusion = [[0, 0], [0, 0]]
    for _ in range(rows):
        confusion[chance.randrange(2)][chance.randrange(2)] += 1
    assert all(problem.kind == "one_class" for problem in answers(confusion).problems)


@settings(max_examples=300)
@given(st.integers(100, 3000), st.floats(0.5, 0.95), st.floats(0.65, 1.0), seeds)
def test_a_classifier_that_finds_both_classes_has_learned(rows: int, share: float, recall: float, seed: int) -> None:
    """Also where always answering the common class has the higher accuracy: then that is said, and is not fatal."""
    generator = numpy.random.default_rng(seed)
    common = round(share * rows)
    right, rare = (int(generator.binomial(count, recall)) for count in (common, rows - common))
    found = answers([[right, common - right], [rows - common - rare, rare]])
    assume(rows - common >= 15 and (recall > 0.8 or rows - common >= 150))  # else it may be chance
    assert found.has_learned
    assert not any(problem.fatal for problem in found.problems)


@pytest.mark.parametrize(
    ("metrics", "kind"),
    [
        ({"mae": 1.0, "r2": 0.0, "loss": 1.0}, "mean"),
        ({"mae": 1.0, "r2": 0.2, "loss": 1.0}, None),
        ({"reward_accuracy": 0.5, "loss": 0.7}, "guessing"),
        ({"reward_accuracy": 0.6, "loss": 0.7}, None),
        ({"f1": 0.0, "exact": 0.4, "loss": 0.7}, "one_class"),
        ({"f1": 0.1, "exact": 0.4, "loss": 0.7}, None),
    ],
)
def test_other_tasks_are_judged_by_their_own_measures(metrics: dict[str, float], kind: str | None) -> None:
    """R² above 0, rewards above chance, any label found; not on a few rows."""
    found = reached(metrics, None, (), rows=FEWEST_ROWS, advice="less")
    assert [problem.kind for problem in found.problems] == ([] if kind is None else [kind])
    assert found.has_learned is (kind is None)
    assert reached(metrics, None, (), rows=FEWEST_ROWS - 1, advice="less") == Reached()


def test_the_head_alone_is_named_where_it_is_better() -> None:
    """Which way is better is the metric's."""
    below: Any = below_baseline("accuracy", 0.68, 0.7063, is_better_high=True, advice="less")
    assert (below.kind, below.fatal) == ("head_alone", False)
    assert below.text == "accuracy is 0.6800, and the head alone reaches 0.7063"
    assert below_baseline("accuracy", 0.71, 0.7063, is_better_high=True, advice="less") is None
    assert below_baseline("accuracy", 0.7063, 0.7063, is_better_high=True, advice="less") is None
    assert below_baseline("loss", 0.5, 0.6, is_better_high=False, advice="less") is None
    assert below_baseline("loss", 0.6, 0.5, is_better_high=False, advice="less") is not None


# --- both together ---


def test_held_out_rows_have_the_last_word() -> None:
    """A run whose best checkpoint is good has learned, though it collapsed later; a slow one has learned a little."""
    lost = heard([*[0.69] * 3, *[0.4] * 10, *[0.69] * 30], math.log(2))[1]
    slow = heard([0.69] * 40, math.log(2))[1]
    assert [problem.fatal for problem in judged(lost, Reached(has_learned=True), 0.4)] == [False]
    assert judged(slow, Reached(has_learned=True), 0.68) == ()
    wrong = Problem("one_class", "all the same", advice="less")
    both = judged(lost, Reached((wrong,), has_learned=False), 0.7)
    assert [problem.kind for problem in both] == ["collapse", "one_class"]
    assert [problem.kind for problem in judged(slow, Reached(), None)] == ["no_learning"]


def test_a_language_models_held_out_loss_above_the_trainings_start_is_said() -> None:
    """By a clear margin: other rows have other losses."""
    learned = heard(falling(2.0, 1.0, 5, 0.01, 50, 0), None)[1]
    assert judged(learned, Reached(), 2.2) == ()
    (problem,) = judged(learned, Reached(), 3.1)
    assert (problem.kind, problem.fatal) == ("held_out_loss", False)
    assert judged(heard([2.0] * 3, None)[1], Reached(), 3.1) == ()


def test_what_to_try_is_half_the_rate_and_a_longer_warm_up() -> None:
    """Written as the command takes it; of a rate far above the usual one, half may still be too high."""
    assert advice(1e-3, 0.06, usual=1e-3) == "--lr 0.0005, or a longer warm-up with --set training.warmup_steps=0.12"
    assert advice(5e-5, 0, usual=1e-3) == "--lr 2.5e-05, or a longer warm-up with --set training.warmup_steps=0.1"
    assert advice(8e-3, 0, usual=1e-3).startswith("--lr 0.001,")
