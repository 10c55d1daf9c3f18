"""Where a classifier is wrong: errors by label, and the labels that it confuses."""

from collections.abc import Mapping

import attrs

from tunerkit_cli.report.record import LabelErrors, Run


@attrs.frozen
class Confused:
    """Rows of one label that were predicted as another, and their share of the label's rows."""

    true: str
    predicted: str
    rows: int
    share: float


@attrs.frozen
class LabelScores:
    """How well a label was predicted: its rows, and recall, precision and F1 where they are defined."""

    rows: int
    recall: float | None
    precision: float | None
    f1: float | None


def label_scores(run: Run) -> tuple[LabelScores, ...]:
    """Return the scores of each label of the confusion matrix, in its order."""
    found = []
    for number, line in enumerate(run.confusion):
        right, rows, predicted = line[number], sum(line), sum(row[number] for row in run.confusion)
        ratios = [right / of if of else None for of in (rows, predicted)]
        f1 = 2 * right / (rows + predicted) if rows + predicted else None
        found.append(LabelScores(rows, ratios[0], ratios[1], f1))
    return tuple(found)


def label_names(run: Run) -> tuple[str, ...]:
    """Return the names of the confusion matrix's rows and columns; numbers if the record has no labels."""
    return run.labels or tuple(str(number) for number in range(len(run.confusion)))


def errors_by_label(run: Run) -> Mapping[str, LabelErrors]:
    """Return the errors of each label: those that the record has, else those that its confusion matrix shows."""
    if run.errors or not run.confusion:
        return run.errors
    names = label_names(run)
    return {names[n]: LabelErrors(sum(row), sum(row) - row[n]) for n, row in enumerate(run.confusion)}


def most_confused(run: Run, count: int) -> tuple[Confused, ...]:
    """Return the ``count`` pairs of labels that are most often confused, the most frequent first."""
    names = label_names(run)
    found = [
        Confused(names[n], names[k], rows, rows / sum(row))
        for n, row in enumerate(run.confusion)
        for k, rows in enumerate(row)
        if n != k and rows > 0
    ]
    return tuple(sorted(found, key=lambda pair: -pair.rows)[:count])
