"""The verdict: one sentence that is true whatever the record has."""

from typing import Any

import pytest

from plugins.cli.tests import run_records
from tunerkit_cli.report.record import Problem, read
from tunerkit_cli.report.verdict import failure, verdict

MAIN = {"metrics": {"accuracy": 0.852}, "main_metric": "accuracy"}
LOSS = {"metrics": {"loss": 1.42}, "main_metric": "loss"}
PARTS = {"parameters": {"trained": 12, "all": 1000}, "rows": {"train": 9, "eval": 3000}}
LOGS = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.31}]


def head(accuracy: float) -> dict[str, Any]:
    return {"baseline": {"what": "head alone, base frozen", "metrics": {"accuracy": accuracy}}}


@pytest.mark.parametrize(
    ("parts", "outcome", "text"),
    [
        (
            {**MAIN, **PARTS, **head(0.699)},
            "better",
            "AdaLoRA reaches accuracy 0.852 on 3,000 held-out rows with 1.2 % of the parameters trained, "
            "15.3 points above the head alone.",
        ),
        (
            {**MAIN, **head(0.872)},
            "worse",
            "AdaLoRA reaches accuracy 0.852 on the held-out rows, 2.0 points below the head alone, which is worse.",
        ),
        (
            {**MAIN, **head(0.852)},
            "open",
            "AdaLoRA reaches accuracy 0.852 on the held-out rows, level with the head alone.",
        ),
        (
            {**LOSS, "rows": {"eval": 1}, "baseline": {"what": "the base model", "metrics": {"loss": 1.91}}},
            "better",
            "AdaLoRA reaches a loss of 1.420 on 1 held-out row, 0.490 below the base model, which is better.",
        ),
        (
            {**LOSS, "baseline": {"what": "base model", "metrics": {"loss": 1.3}}},
            "worse",
            "AdaLoRA reaches a loss of 1.420 on the held-out rows, 0.120 above the base model, which is worse.",
        ),
        ({**LOSS, **head(0.5)}, "open", "AdaLoRA reaches a loss of 1.420 on the held-out rows."),
        (
            {"logs": LOGS, "steps": 375, "parameters": {"trained": 12, "all": 1000}},
            "open",
            "AdaLoRA trained 1.2 % of the parameters for 375 steps without held-out rows; "
            "the training loss fell from 0.700 to 0.310.",
        ),
        (
            {"logs": [*LOGS[::2][::-1], {"step": 4, "loss": 0.9}], "steps": 1},
            "open",
            "AdaLoRA trained an adapter for 1 step without held-out rows; the training loss rose from 0.700 to 0.900.",
        ),
        (
            {"logs": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]},
            "open",
            "AdaLoRA trained an adapter without held-out rows; the training loss stayed at 0.500.",
        ),
        ({}, "open", "AdaLoRA trained an adapter without held-out rows."),
    ],
)
def test_the_verdict_says_what_the_record_knows(parts: dict[str, Any], outcome: str, text: str) -> None:
    """With and without baseline, held-out rows, parameters and logs; lower losses are better."""
    found = verdict(read(run_records.minimal(**parts)))
    assert found.text.replace("\xa0", " ") == text
    assert found.outcome == outcome


def test_a_noisy_loss_is_averaged_at_both_ends() -> None:
    """Over a twentieth of the rows each."""
    logs = [{"step": step, "loss": (2.0 if step < 50 else 1.0) + (0.5 if step % 2 else -0.5)} for step in range(200)]
    assert "fell from 2.000 to 1.000." in verdict(read(run_records.minimal(logs=logs))).text


def test_what_is_wrong_with_a_run_is_one_sentence_with_one_piece_of_advice() -> None:
    """What is fatal comes first, and decides how it begins; without problems there is nothing to say."""
    below = Problem("head_alone", "accuracy is 0.6, and the head alone reaches 0.7", advice="more", fatal=False)
    lost = Problem("collapse", "the loss is back", step=3, advice="less")
    assert failure([]) == ""
    assert failure([below]) == f"this run learned less than it should: {below.text}; try more"
    assert failure([below, lost]) == f"this run did not learn: {lost.text}; {below.text}; try less"
    assert failure([Problem("one_class", "all the same")]) == "this run did not learn: all the same"
