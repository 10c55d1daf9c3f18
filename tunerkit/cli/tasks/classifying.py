"""Metrics of classification, by scikit-learn."""

from collections.abc import Sequence
from typing import Any

from tunerkit.cli.tasks.base import Results


def classification_results(truth: Sequence[int], predicted: Sequence[int], classes: int, loss: float) -> Results:
    """Accuracy, macro F1 and the confusion matrix; ``truth`` and ``predicted`` are class numbers, one per row."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    numbers = list(range(classes))
    confusion: Any = confusion_matrix(truth, predicted, labels=numbers)
    metrics = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "f1": float(f1_score(truth, predicted, labels=numbers, average="macro", zero_division=0)),
        "loss": loss,
    }
    return Results(metrics, confusion.tolist())


def accuracy_of(prediction: Any) -> dict[str, float]:
    """The accuracy of a `transformers.EvalPrediction` with class logits: what is logged while training."""
    from sklearn.metrics import accuracy_score

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(accuracy_score(prediction.label_ids, logits.argmax(-1)))}
