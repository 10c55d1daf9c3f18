"""Scores by label and confused labels, compared with counting row by row."""

from collections import Counter

import pytest
from hypothesis import given, strategies as st

from plugins.cli.tests import run_records
from tunerkit_cli.report.record import read
from tunerkit_cli.report.scores import label_names, label_scores, most_confused

NAMES = ("a", "b", "c")
predictions = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=40)


@given(predictions)
def test_the_matrix_is_counted_as_its_rows_would_be(pairs: list[tuple[str, str]]) -> None:
    """Recall, precision, F1 and confused pairs are those of the single predictions."""
    counts = Counter(pairs)
    run = read(run_records.minimal(labels=list(NAMES), confusion=[[counts[t, p] for p in NAMES] for t in NAMES]))
    for name, (rows, recall, precision, f1) in zip(NAMES, label_scores(run), strict=True):
        of = [predicted for true, predicted in pairs if true == name]
        named = [true for true, predicted in pairs if predicted == name]
        assert rows == len(of)
        assert recall == (of.count(name) / len(of) if of else None)
        assert precision == (named.count(name) / len(named) if named else None)
        if recall and precision:
            assert f1 == pytest.approx(2 * recall * precision / (recall + precision))
    wrong = Counter({pair: count for pair, count in counts.items() if pair[0] != pair[1]})
    shown = most_confused(run, 100)
    assert {(true, predicted): rows for true, predicted, rows, _ in shown} == wrong
    assert [rows for _, _, rows, _ in shown] == sorted(wrong.values(), reverse=True)
    assert most_confused(run, 2) == shown[:2]


def test_labels_without_names_are_numbered() -> None:
    """In the order of the matrix."""
    assert label_names(read(run_records.minimal(confusion=[[1, 2], [3, 4]]))) == ("0", "1")
