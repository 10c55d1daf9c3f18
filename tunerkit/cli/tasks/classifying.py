"""Metrics of classification, by scikit-learn."""

from typing import Any


def classification_scores(predictions: Any, truth: Any) -> dict[str, float]:
    """Accuracy and macro F1 of logits (rows, classes) for class numbers (rows,)."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted, numbers = predictions.argmax(-1), list(range(predictions.shape[-1]))
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "f1": float(f1_score(truth, predicted, labels=numbers, average="macro", zero_division=0)),
    }


def confusion_of(predictions: Any, truth: Any) -> list[list[int]]:
    """The confusion matrix of logits (rows, classes) for class numbers (rows,): rows by true class."""
    from sklearn.metrics import confusion_matrix

    found: Any = confusion_matrix(truth, predictions.argmax(-1), labels=list(range(predictions.shape[-1])))
    counts: list[list[int]] = found.tolist()
    return counts
