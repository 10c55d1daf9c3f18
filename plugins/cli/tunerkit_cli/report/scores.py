"""Scores: which metric counts, which direction is better, how two values compare, and where a classifier is wrong."""

import re
from collections.abc import Iterator, Mapping
from typing import Final

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
    **{"rouge_l": "ROUGE-L", "chrf": "chrF", "bleu": "BLEU", "nll": "NLL", "kl": "KL", "mrr": "MRR"},
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
    return _TITLES.get(name) or " ".join(_TITLES.get(word, word) for word in re.split(r"[_\s]+", name)) or name


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


def label_scores(run: Run) -> Iterator[tuple[int, float | None, float | None, float | None]]:
    """Yield rows, recall, precision and F1 of each label of the confusion matrix; None where one is not defined."""
    for number, (line, column) in enumerate(zip(run.confusion, zip(*run.confusion, strict=True), strict=True)):
        right, rows, predicted = line[number], sum(line), sum(column)
        recall, precision = (right / of if of else None for of in (rows, predicted))
        yield rows, recall, precision, 2 * right / (rows + predicted) if rows + predicted else None


def label_names(run: Run) -> tuple[str, ...]:
    """Return the names of the confusion matrix's rows and columns; numbers if the record has no labels."""
    return run.labels or tuple(str(number) for number in range(len(run.confusion)))


def most_confused(run: Run, count: int) -> list[tuple[str, str, int, float]]:
    """The ``count`` pairs that are confused most often, the true label first, with the rows and their share of its."""
    names = label_names(run)
    found = [
        (names[n], names[k], rows, rows / sum(line))
        for n, line in enumerate(run.confusion)
        for k, rows in enumerate(line)
        if n != k and rows > 0
    ]
    return sorted(found, key=lambda pair: -pair[2])[:count]
