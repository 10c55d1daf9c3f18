"""The record of a run: what is read, and what is refused."""

from typing import Any

import pytest
from hypothesis import given, strategies as st

from plugins.cli.tests import run_records
from tunerkit_cli.report.record import RecordError, Run, read

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("record", [run_records.classifier(), run_records.language_model(), run_records.regression()])
def test_what_the_record_has_is_there(record: dict[str, Any]) -> None:
    """Each key is an attribute with the same value, lists as tuples."""
    run = read(record)
    for key in ("task", "method", "metrics", "rows", "ranks", "config", "steps"):
        if key in record:
            assert getattr(run, key) == record[key]
    assert [dict(row) for row in run.logs] == record.get("logs", [])
    assert {path: list(found) for path, found in run.spectrum.items()} == record.get("spectrum", {})


def test_only_version_task_and_method_are_required() -> None:
    """All other parts are empty or None, also where the record says None; further keys are left out."""
    plain = read(run_records.minimal())
    assert plain == Run(version=1, task="text-classification", method="adalora")
    assert read(run_records.minimal(steps=None, ranks=None, somebodys_key=[1], parameters={"more": 1})) == plain
    with pytest.raises(RecordError, match=r"run: there is no 'method'"):
        read({"version": 1, "task": "regression"})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"steps": "75"}, r"run\.steps: expected a whole number, got '75'"),
        ({"steps": True}, r"run\.steps: expected a whole number, got True"),
        ({"ranks": {"a.b": 1.5}}, r"run\.ranks\.a\.b: expected a whole number, got 1\.5"),
        ({"metrics": {"accuracy": float("nan")}}, r"run\.metrics\.accuracy: expected at least -1e\+100, got nan"),
        ({"metrics": {"loss": 10**400}}, r"run\.metrics\.loss: expected at most 1e\+100, got 1000"),
        ({"metrics": [0.5]}, r"run\.metrics: expected a mapping, got \[0\.5\]"),
        ({"labels": "ab"}, r"run\.labels: expected a list, got 'ab'"),
        ({"spectrum": {"a": [1, "b"]}}, r"run\.spectrum\.a\[1\]: expected a number, got 'b'"),
        ({"history": [{"budget": 3}]}, r"run\.history\[0\]: there is no 'step'"),
        ({"budget": 8}, r"run\.budget: expected a mapping, got 8"),
        ({"greater_is_better": 1}, r"run\.greater_is_better: expected true or false, got 1"),
        ({"ranks": {"a": 1}, "history": [{"step": 7, "ranks": [1, 2]}]}, r"other ranks than the 1 .* at step 7"),
        ({"confusion": [[1, 2], [3]]}, r"run\.confusion is not square"),
        ({"confusion": [[1]], "labels": ["a", "b"]}, r"run\.confusion has 1 rows, and run\.labels has 2 names"),
        ({"version": 2}, r"expected a record of version 1, got version 2; use the tunerkit that wrote it"),
        ({"version": None}, r"expected a record of version 1, got version None"),
    ],
)
def test_a_damaged_record_is_refused_with_what_is_wrong(part: dict[str, Any], message: str) -> None:
    """The error names the place, what stands there and what is allowed, and says what to do."""
    with pytest.raises(RecordError, match=message) as caught:
        read(run_records.minimal(**part))
    assert "train" in str(caught.value) or "tunerkit" in str(caught.value)


@given(st.sampled_from(sorted(run_records.classifier())), values)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    """No value of any key leads to another error than ours, and messages stay short."""
    message = ""
    try:
        read({**run_records.minimal(), key: value})
    except RecordError as problem:
        message = str(problem)
    assert len(message) < 3000


@pytest.mark.parametrize("record", [None, [1], "run"])
def test_what_is_no_mapping_is_refused(record: Any) -> None:
    """Such as the list in another program's file."""
    with pytest.raises(RecordError, match="which is a mapping"):
        read(record)
