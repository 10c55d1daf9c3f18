"""What classifiers share: metrics, by scikit-learn, and predictions with the probability of each class."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def classification_scores(predictions: Any, truth: Any) -> dict[str, float]:
    """Accuracy and macro F1 of logits (rows, classes) for class numbers (rows,).

    The mean F1 is over the classes that are true or predicted in a row: others have none.
    """
    from sklearn.metrics import accuracy_score, f1_score

    predicted = predictions.argmax(-1)
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }


def confusion_of(predictions: Any, truth: Any) -> list[list[int]]:
    """The confusion matrix of logits (rows, classes) for class numbers (rows,): rows by true class."""
    from sklearn.metrics import confusion_matrix

    found: Any = confusion_matrix(truth, predictions.argmax(-1), labels=list(range(predictions.shape[-1])))
    counts: list[list[int]] = found.tolist()
    return counts


def chosen_class(found: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """The most probable class, and all probabilities, from what a pipeline of transformers answers for a row."""
    scores = probabilities(found, labels)
    best = max(scores, key=scores.__getitem__)
    return {"label": best, "score": scores[best], "scores": scores}


def probabilities(found: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, float]:
    """The probability of each class, in the order of ``labels``, from a pipeline's answer for a row."""
    scores = {each["label"]: float(each["score"]) for each in found}
    return {name: scores[name] for name in labels}
