"""Scores: which metric counts, which direction is better, how two values compare, and where a classifier is wrong."""

import re
from collections.abc import Mapping
from typing import Final

import attrs

from tunerkit_cli.report import wording
from tunerkit_cli.report.record import Run

_LOWER: Final = frozenset({"loss", "perplexity", "ppl", "error", "errors", "mse", "rmse", "mae", "wer", "cer", "nll"})
# A share of rows: two of them differ by points, hundredths of 1.
_SHARES: Final = frozenset(
    {"accuracy", "accuracies", "acc", "f1", "precision", "recall", "auc", "jaccard", "match", "wer", "cer"}
)
_TITLES: Final = {
    **{"f1": "F1", "mse": "MSE", "rmse": "RMSE", "mae": "MAE", "auc": "AUC", "wer": "WER", "cer": "CER", "r2": "R²"},
    **{"pearson": "Pearson", "spearman": "Spearman", "matthews": "Matthews"},
    **{"bleu": "BLEU", "nll": "NLL", "kl": "KL", "mrr": "MRR"},
}


def main_metric(metrics: Mapping[str, float], wanted: str | None) -> str | None:
    """Return the metric that a verdict names: the wanted one, else the first that is no loss, else the first."""
    if wanted in metrics:
        return wanted
    return next((name for name in metrics if name != "loss"), next(iter(metrics), None))


def is_better_high(name: str, run: Run | None = None) -> bool:
    """Whether a greater value of a metric is better, as the run says of its main metric, or judged by its name."""
    if run is not None and name == run.main_metric and run.greater_is_better is not None:
        return run.greater_is_better
    return not _LOWER & _words(name)


def is_share(name: str) -> bool:
    """Whether a metric is a share of 1, such as an accuracy."""
    return bool(_SHARES & _words(name))


def title(name: str) -> str:
    """Write a metric's name for readers: ``macro_f1`` is "macro F1"."""
    return " ".join(_TITLES.get(word, word) for word in re.split(r"[_\s]+", name)) or name


def distance(name: str, difference: float) -> str:
    """Write how far two values of a metric are apart, without a sign: ``15.3 points``, ``0.120``."""
    if is_share(name):
        points = f"{abs(100 * difference):.1f}"
        return f"{points}{wording.SPACE}{'point' if points == '1.0' else 'points'}"
    return wording.decimals(abs(difference))


def signed(name: str, difference: float) -> str:
    """Write a difference with its sign: ``+15.3 points``, ``−0.120``."""
    return f"{'+' if difference > 0 else wording.MINUS if difference < 0 else '±'}{distance(name, difference)}"


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


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
