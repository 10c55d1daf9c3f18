"""The parts of a sweep: its settings, its rounds, equal sizes, and the statistics of its verdict."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tunerkit.errors import ConfigError
from tunerkit_cli.sweeping import grid, scoring, sizes, telling
from tunerkit_cli.sweeping.statistics import Scores, difference, outcome, rows_to_tell, seeds_to_tell
from tunerkit_cli.sweeping.telling import Result
from tunerkit_cli.tasks import task_of

ROWS, SEEDS = 1000, 5


def drawn(
    rng: np.random.Generator, accuracy: float, seeds: int, rows: int, *, hard: Scores, noise: float = 0.06
) -> Scores:
    """Right and wrong answers; rows differ in how hard they are, and seeds by about a point."""
    logit = np.log(accuracy / (1 - accuracy)) + hard + rng.normal(0, noise, (seeds, 1))
    found: Scores = (rng.random((seeds, rows)) < 1 / (1 + np.exp(-logit))).astype(float)
    return found


def test_values_are_cut_at_commas_and_single_ones_are_settings_of_all_runs() -> None:
    """Commas in brackets and in quotes separate nothing."""
    axes, fixed = grid.axes_of("5e-4, 1e-3", ["config.targets=[[q_proj,v_proj],[q]],'k,o'", "config.rank=4"])
    assert axes == {"training.learning_rate": ["5e-4", "1e-3"], "config.targets": ["[[q_proj,v_proj],[q]]", "'k,o'"]}
    assert fixed == ["config.rank=4"]


@pytest.mark.parametrize(
    ("rates", "settings", "said"),
    [
        (None, ["rank"], "--set 'rank': expected key=value,value"),
        ("1e-3,", [], "expected key=value,value"),
        ("1e-3,1e-2", ["learning_rate=1,2"], "--set learning_rate: is given twice"),
        (None, ["seed=1,2"], "--seeds says how many seeds"),
        (None, ["data=a.csv,b.csv"], "compared on the same rows"),
        (None, ["method=lora,dora"], "--methods lists the methods"),
    ],
)
def test_what_cannot_vary_is_refused(rates: str | None, settings: list[str], said: str) -> None:
    """Each with the option that does it."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        grid.axes_of(rates, settings)


def test_settings_that_are_the_same_and_none_that_vary_are_refused() -> None:
    """One text that is another's number is one setting."""
    with pytest.raises(ConfigError, match=r"0\.001 and learning_rate 1e-3 are the same settings"):
        grid.arms_of({}, {"training.learning_rate": ["0.001", "1e-3"]})
    with pytest.raises(ConfigError, match="nothing to compare"):
        grid.arms_of({}, {})


def test_each_contender_has_all_values_and_its_own_settings() -> None:
    """What a size sets stands beside the recipe's own settings."""
    contenders = {"dora of size 5": {"method": "dora", "config": {"rank": 5}}, "lora": {"method": "lora", "config": {}}}
    arms = grid.arms_of({"config": {"targets": ["key"]}}, {"training.learning_rate": ["0.1", "0.2"]}, contenders)
    assert [(arm.contender, arm.rate) for arm in arms] == [
        ("dora of size 5", 0.1),
        ("dora of size 5", 0.2),
        ("lora", 0.1),
        ("lora", 0.2),
    ]
    assert arms[0].recipe.config == {"targets": ["key"], "rank": 5}
    assert arms[0].folder == "01-dora-of-size-5-learning_rate-0.1"


@pytest.mark.parametrize(
    ("settings", "seeds", "expected"),
    [(1, 3, [(1, 3)]), (3, 3, [(3, 1), (2, 2), (1, 3)]), (9, 5, [(9, 1), (5, 2), (3, 4), (2, 5)]), (4, 1, [(4, 1)])],
)
def test_the_better_half_goes_on_with_twice_the_seeds(
    settings: int, seeds: int, expected: list[tuple[int, int]]
) -> None:
    """Until one is left, or all seeds are used."""
    assert grid.rounds(settings, seeds) == expected


def by_rank(method: str, settings: Mapping[str, Any]) -> int:
    """Parameters as LoRA, LoHa (two products) and DoRA (a magnitude) have them at a layer of 64 by 64."""
    per_rank, own = {"lora": (128, 0), "loha": (256, 0), "dora": (128, 64)}[method]
    return per_rank * int(settings["rank"]) + own


def test_methods_get_as_many_parameters_as_lora_of_the_size() -> None:
    """A method with a budget ends at the mean rank; LoHa needs half of LoRA's rank."""
    found = sizes.contenders_of(["lora", "AdaLoRA", "loha", "dora"], [8], {"targets": ["key"]}, by_rank)
    assert {name: each["config"] for name, each in found.items()} == {
        "lora of size 8": {"rank": 8},
        "adalora of size 8": {"target_rank": 8, "budget_unit": "parameters"},
        "loha of size 8": {"rank": 4},
        "dora of size 8": {"rank": 8},
    }


def test_sizes_that_cannot_be_shared_are_refused_with_the_smallest_that_can() -> None:
    """At size 2, DoRA has a quarter more or fewer, and LoHa has no half ranks."""
    with pytest.raises(ConfigError) as raised:
        sizes.contenders_of(["dora", "loha"], [2, 5], {}, by_rank)
    assert [*raised.value.problems] == [
        "--sizes 2: LoRA then has 256 parameters, and dora has no rank with about as many: at rank 1 it has 192",
        "--sizes 5: LoRA then has 640 parameters, and loha has no rank with about as many: at rank 2 it has 512",
        "the smallest size that dora, loha can share is 6",
    ]
    with pytest.raises(ConfigError, match="ia3 has no rank"):
        sizes.contenders_of(["ia3"], [2], {}, by_rank)


def test_losses_that_cannot_be_compared_are_refused() -> None:
    """A greater beta makes DPO's loss smaller whatever is learned; embeddings are scored in batches."""
    scoring.refuse_unlike(task_of("preference"), ["training.learning_rate", "config.rank"])
    scoring.refuse_unlike(task_of("text-classification"), ["max_length"])
    with pytest.raises(ConfigError, match=r"training\.beta: changes the loss of preference itself"):
        scoring.refuse_unlike(task_of("preference"), ["training.beta"])
    with pytest.raises(ConfigError, match="embedding: its loss is one of batches"):
        scoring.refuse_unlike(task_of("embedding"), ["training.learning_rate"])


def test_a_difference_has_the_interval_of_both_seeds_and_rows() -> None:
    """By hand: the variances of two seeds and two rows, of which one is the sum of the others."""
    found = difference(np.array([[1.0, 0.0], [0.0, 0.0]]), np.zeros((2, 2)))
    assert found.mean == 0.25
    assert (found.of_seeds, found.of_rows, found.of_both) == (0.0, 0.0, 0.25)
    assert difference(np.ones((1, 3)), np.zeros((1, 3))).low == -np.inf
    assert not difference(np.ones((3, 4)), np.ones((3, 4))).is_told


@pytest.mark.parametrize("noise", [0.0, 0.06, 0.2])
@pytest.mark.parametrize("seeds", [2, 3, SEEDS])
def test_a_method_against_itself_seldom_wins(seeds: int, noise: float) -> None:
    """The interval holds its level: at most 6 % of comparisons of one method with itself tell a winner.

    That of two or three seeds that differ much is a little too narrow, as the degrees of freedom are estimated too.
    """
    rng = np.random.default_rng(61)
    told = 0
    for _ in range(1000):
        hard = rng.normal(0, 1.5, (1, 200))
        one, other = (drawn(rng, 0.85, seeds, 200, hard=hard, noise=noise) for _ in range(2))
        told += difference(one, other).is_told
    assert told <= (0.06 if seeds == SEEDS else 0.09) * 1000


def test_four_points_are_found_and_the_best_of_three_is_named() -> None:
    """With five seeds and 1,000 rows: in 80 % of repetitions the gap is told, and the best is named in 95 %."""
    rng = np.random.default_rng(62)
    told = named = 0
    for _ in range(200):
        hard = rng.normal(0, 1.0, (2, 1, ROWS))
        results = {}
        for name, accuracy in (("low", 0.80), ("good", 0.87), ("high", 0.82)):
            choosing, judging = (drawn(rng, accuracy, SEEDS, ROWS, hard=each) for each in hard)
            results[name] = Result(choosing, judging, 1, 1.0)
        found = telling.chosen(results)
        named += found.best == "good"
        told += found.best == "good" and found.differences["high"].is_told
    assert named >= 0.95 * 200
    assert told >= 0.8 * 200


def test_few_rows_and_seeds_say_how_many_more_would_tell() -> None:
    """More seeds, where seeds are what differs; more rows, where no number of seeds would do."""
    rng = np.random.default_rng(63)
    rows = rng.normal(0, 1, 200)
    by_seed = np.array([[0.5], [0.0], [1.0]])
    seeds = difference(np.tile(by_seed, (1, 200)) + 0.0 * rows, np.zeros((3, 200)))
    assert not seeds.is_told
    assert seeds_to_tell(seeds) == 7
    few = difference(np.tile(rows - rows.mean() + 0.05, (3, 1)), np.zeros((3, 200)))
    assert seeds_to_tell(few) is None
    assert (rows_to_tell(few) or 0) > 200


def test_the_sentence_says_what_to_take_and_what_would_tell() -> None:
    """In words: the best, those that are worse, and those that are level."""
    rng = np.random.default_rng(64)
    hard = rng.normal(0, 1, (1, 200))
    results = {}
    for name, accuracy in (("rank 2", 0.6), ("rank 4", 0.9), ("rank 8", 0.89)):
        choosing, judging = (drawn(rng, accuracy, 3, 200, hard=hard) for _ in range(2))
        results[name] = Result(choosing, judging, 10, 1.0)
    said = telling.sentence(results, "accuracy")
    assert re.fullmatch(
        r"take (rank [48]): accuracy \d+\.\d % on 200 rows, better than rank 2, by \+\d+\.\d points to "
        r"\+\d+\.\d points, and not to be told from rank [48] with 3 seeds( \(.* would tell\))?",
        said,
    ), said
    worse = {
        "a": Result(np.ones((3, 9)), np.zeros((3, 9)), 1, 1.0),
        "b": Result(np.zeros((3, 9)), np.ones((3, 9)), 1, 1.0),
    }
    assert "take a: accuracy 0.0 % on 9 rows, but b did better on these rows, by" in telling.sentence(worse, "accuracy")
    assert outcome("rank 4", {"rank 4": np.ones((2, 5)), "rank 2": np.zeros((2, 5))}).is_told
