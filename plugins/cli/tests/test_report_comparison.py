"""The comparison of runs: what differs, and which is the best."""

from typing import Any

import pytest

from plugins.cli.tests import pages, run_records
from tunerkit_cli.report.html import compare
from tunerkit_cli.report.record import RecordError

minimal = run_records.minimal


def text(**records: dict[str, Any]) -> str:
    return pages.checked(compare(records)).text.replace("\xa0", " ")


def scored(accuracy: float, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return minimal(metrics={"accuracy": accuracy, "loss": loss}, main_metric="accuracy", **more)


def test_the_best_run_is_named_and_each_best_value_is_marked() -> None:
    """By the direction of each metric; equal values are not marked."""
    found = text(a=scored(0.8, 0.5), b=scored(0.9, 0.4), c=scored(0.7, 0.3))
    assert "b has the highest accuracy, 0.900, 10.0 points above a." in found
    assert "accuracy 0.8000 0.9000 ★ 0.7000" in found
    assert "loss 0.5000 0.4000 0.3000 ★" in found
    assert "★" not in text(a=scored(0.8), b=scored(0.8))
    assert "a and b are level with accuracy 0.800." in text(a=scored(0.8), b=scored(0.8))


def test_a_lower_loss_is_better() -> None:
    """Also where it is the main metric."""
    records = {name: minimal(metrics={"loss": loss}) for name, loss in (("a", 2.0), ("b", 1.5))}
    assert "b has the lowest loss, 1.500, 0.500 below a." in text(**records)


def test_only_settings_that_differ_are_listed() -> None:
    """Of the method's settings and of the recipe; what a run lacks counts as a difference."""
    one = scored(
        0.8, config={"rank": 8, "alpha": 16}, recipe={"training": {"seed": 0, "lr": 0.1}, "config": {"rank": 8}}
    )
    two = scored(0.8, config={"rank": 4, "alpha": 16}, recipe={"training": {"seed": 0}, "config": {"rank": 4}})
    found = text(a=one, b=two)
    assert "setting a b recipe.training.lr 0.1 – config.rank 8 4" in found
    assert "alpha" not in found
    assert "Settings that differ" not in text(a=one, b=one)


def test_curves_lie_over_each_other() -> None:
    """One curve from each run with its name; a smoothed one goes with one that is too short to be smoothed."""
    long = [{"step": step, "loss": 1 / (step + 1)} for step in range(50)]
    short = [{"step": step, "loss": 0.5, "eval_loss": 0.25} for step in range(5)]
    page = compare({"a": minimal(logs=long), "b": minimal(logs=short)})
    found = pages.checked(page).text
    assert "Loss, training a b" in found
    assert "Loss, held-out" not in found
    assert "optimizer step 0\na: 1\nb: 0.5" in pages.titles(page)


def test_ranks_stand_side_by_side_with_one_scale() -> None:
    """Runs without ranks are left out, and constant ranks are a sentence."""
    page = compare(
        {
            "a": minimal(ranks={"m.0.q": 1, "m.1.q": 2}),
            "b": minimal(ranks={"m.0.q": 4, "m.1.q": 4}, caps={"m.0.q": 8, "m.1.q": 8}),
            "c": minimal(),
        }
    )
    found = pages.checked(page).text
    assert "rank 0 8" in found
    assert "8 live ranks in 2 matrices: 4 each." in found
    assert len([title for title in pages.titles(page) if title.startswith("layer")]) == 2


def test_what_cannot_be_compared_is_said() -> None:
    """Different tasks, or different held-out rows."""
    assert "differ in their held-out data, so" in text(
        a=scored(0.8, rows={"eval": 10}), b=scored(0.8, rows={"eval": 20})
    )
    both = text(a=minimal("regression", rows={"eval": 1}), b=minimal(rows={"eval": 2}))
    assert "differ in their task and held-out data, so" in both
    assert "differ in their" not in text(a=scored(0.8), b=scored(0.9))


def language(loss: float, task: str = "causal-lm", prompts: bool = False, base: str = "llama", **more: Any) -> Any:
    """The record of a language model: causal-lm has a loss, preference a share too."""
    metrics = {"loss": loss, **({"reward_accuracy": 0.9} if task == "preference" else {})}
    main = "reward_accuracy" if task == "preference" else "loss"
    logs = [{"step": step, "loss": loss, "learning_rate": 1 / (step + 1)} for step in range(3)]
    known = {
        "recipe": {"train_on_prompts": prompts},
        "data": {"eval": "chat.jsonl"},
        "rows": {"eval": 8},
        "model": {"name": base},
        "logs": logs,
    }
    return minimal(task, metrics=metrics, main_metric=main, **{**known, **more})


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (language(0.2, "preference"), "task"),
        (language(0.2, prompts=True), "learned tokens"),
        (language(0.2, base="qwen"), "base model"),
        (language(0.2, rows={"eval": 9}), "held-out data"),
        (language(0.2, recipe={}, conversations=True), "learned tokens"),
    ],
    ids=["task", "prompts", "base", "rows", "an earlier version"],
)
def test_what_was_measured_in_other_ways_is_not_ranked_together(other: dict[str, Any], differing: str) -> None:
    """No star, no best run, and no loss of one task over that of another; the reason is said."""
    found = text(sft=language(0.5), other=other)
    assert f"The runs differ in their {differing}, so their metrics are not comparable." in found
    assert "★" not in found
    assert "has the lowest" not in found
    assert "Learning rate sft other" in found
    assert ("Loss, training sft other" in found) is (differing != "task")


def test_a_run_that_did_not_learn_is_named_first() -> None:
    """Before the heading, and the others are not."""
    lost = scored(0.5, problems=[{"kind": "one_class", "text": "all rows are predicted as 'b'", "advice": "less"}])
    page = compare({"good": scored(0.8), "lost": lost})
    found = pages.checked(page).text
    assert "lost: this run did not learn: all rows are predicted as 'b'; try less." in found
    assert "this run did not learn" in page.partition("<h1>")[0]
    assert "good: this run" not in found


def test_names_are_escaped() -> None:
    """They are folders of the user."""
    page = compare({"<script>alert(1)</script>": run_records.classifier(2), "b": run_records.classifier(2)})
    pages.checked(page)
    assert "<script" not in page


def test_one_run_is_no_comparison_and_errors_name_their_run() -> None:
    """So that one of many can be repaired."""
    with pytest.raises(RecordError, match="expected two runs or more to compare, got 1"):
        compare({"a": minimal()})
    with pytest.raises(RecordError, match=r"^b: run\.steps: expected a whole number, got 'x'"):
        compare({"a": minimal(), "b": minimal(steps="x")})
