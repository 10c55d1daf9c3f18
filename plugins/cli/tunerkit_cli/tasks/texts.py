"""The tasks on single texts, or pairs of texts: one class, a number, or any number of labels."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import attrs

from tunerkit_cli.rows import BadValue, DataError, class_names, class_numbers, from_json
from tunerkit_cli.tasks.base import LABEL, TEXT, Column, Row, Task, pipeline_of, require_text
from tunerkit_transformers.pretrained import Pretrained

PAIR = Column("text_pair", ("sentence2", "hypothesis", "question"), needed=False)
THRESHOLD = 0.5


class TextTask(Task):
    """A task whose rows are a text, or a pair of texts, and a label: a class, where the task has no other one."""

    columns: ClassVar[tuple[Column, ...]] = (TEXT, PAIR, LABEL)
    label_column: ClassVar[str] = LABEL.name
    pipeline_options: ClassVar[Mapping[str, Any]] = {"top_k": None}  # a probability for each class
    # Texts of similar length share a batch, which saves padding.
    defaults: ClassVar[Mapping[str, Any]] = {**Task.defaults, "train_sampling_strategy": "group_by_length"}

    def checked(self, row: Row) -> Row:
        return {name: self.label(row[name]) if name == "label" else require_text(row, name) for name in row}

    def label(self, value: object) -> Any:
        """Return a label of the task's type. Raises `BadValue`."""
        return class_label(value)

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[Any]:
        """The labels as the model's loss takes them."""
        return class_numbers((row["label"] for row in rows), labels)

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Tokenize, truncate to `limit` tokens or the model's limit, and number the labels."""
        import datasets

        texts = [[row[name] for row in rows] for name in ("text", "text_pair") if rows and name in rows[0]]
        encoded = dict(loaded.processor(*texts, truncation=True, max_length=token_limit(loaded, self.limit)))
        if rows and "label" in rows[0]:
            encoded["labels"] = self.targets(rows, labels_of(loaded))
        return datasets.Dataset.from_dict(encoded)

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Pad each batch to its longest text, and log the metrics."""
        from transformers import DataCollatorWithPadding

        return {"data_collator": DataCollatorWithPadding(loaded.processor), "compute_metrics": self.compute_metrics}

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """Predict with the pipeline of transformers."""
        inputs = [{key: row[key] for key in ("text", "text_pair") if key in row} for row in rows]
        pipeline = pipeline_of(self.name, loaded)
        limit = token_limit(loaded, self.limit)
        found = pipeline(inputs, batch_size=batch_size, truncation=True, max_length=limit, **self.pipeline_options)
        return [self.prediction(each, labels_of(loaded)) for each in found]

    def prediction(self, found: Any, labels: Sequence[str]) -> dict[str, Any]:
        """One row's prediction, from the pipeline's answer."""
        return chosen_class(found, labels)


class TextClassification(TextTask):
    """Texts with one of several classes."""

    main_metric: ClassVar[str] = "accuracy"
    has_baseline: ClassVar[bool] = True
    one_class: ClassVar[bool] = True


class Regression(TextTask):
    """Texts with a number."""

    measures: ClassVar[tuple[str, ...]] = ("loss", "mae", "r2")
    pipeline_options: ClassVar[Mapping[str, Any]] = {"function_to_apply": "none"}

    def label(self, value: object) -> float:
        """A finite number."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise BadValue("label", "regression needs a finite number, got %s", value)
        return number

    def guess_loss(self, rows: Sequence[Row]) -> float | None:
        """The variance of the numbers: the loss of answering with their mean."""
        import numpy

        with numpy.errstate(over="ignore", invalid="ignore"):  # numbers near 1e200 have squares that are infinite
            return float(numpy.var([row["label"] for row in rows]))

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[float]:
        return [row["label"] for row in rows]

    def scores(self, predictions: Any, truth: Any) -> dict[str, float]:
        """Mean absolute error and R², which needs two rows; the loss is the mean squared error."""
        from sklearn.metrics import mean_absolute_error, r2_score

        predicted = predictions.reshape(-1)
        scores = {"mae": float(mean_absolute_error(truth, predicted))}
        return {**scores, **({"r2": float(r2_score(truth, predicted))} if len(truth) > 1 else {})}

    def prediction(self, found: Any, labels: Sequence[str]) -> dict[str, Any]:
        return {"value": float(found["score"])}


class MultiLabel(TextTask):
    """Texts with a list of labels, which may be empty."""

    columns: ClassVar[tuple[Column, ...]] = (TEXT, PAIR, attrs.evolve(LABEL, other_names=("labels", "classes", "tags")))
    main_metric: ClassVar[str] = "f1"
    measures: ClassVar[tuple[str, ...]] = ("loss", "f1", "exact")
    pipeline_options: ClassVar[Mapping[str, Any]] = {"function_to_apply": "sigmoid", "top_k": None}

    def label(self, value: object) -> list[str]:
        """A list of labels; in csv and tsv, a JSON list such as ``["a", "b"]``."""
        return tag_list(value, "label")

    def labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """All labels, of which there may be only one."""
        names = class_names(label for row in rows for label in row["label"])
        if not names:
            raise DataError('no training row has a label; each row has a list of labels, such as ["sport", "war"]')
        return names

    def guess_loss(self, rows: Sequence[Row]) -> float | None:
        """The mean entropy of the labels, each of which is there or not."""
        counts = Counter(name for row in rows for name in {*row["label"]})
        shares = [count / len(rows) for count in counts.values() if count < len(rows)]
        return -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in shares) / len(counts) if counts else None

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[list[float]]:
        """A row of 0 and 1 for each text."""
        chosen = [set(class_numbers(row["label"], labels)) for row in rows]
        return [[float(number in own) for number in range(len(labels))] for own in chosen]

    def scores(self, predictions: Any, truth: Any) -> dict[str, float]:
        """Micro F1, and the share of rows with exactly the right labels. A label is predicted above 0.5."""
        from sklearn.metrics import accuracy_score, f1_score

        predicted = (predictions > 0).astype(int)  # a logit of 0 is a probability of THRESHOLD
        wanted = truth.astype(int)
        return {
            "f1": float(f1_score(wanted, predicted, average="micro", zero_division=0)),
            "exact": float(accuracy_score(wanted, predicted)),
        }

    def prediction(self, found: Any, labels: Sequence[str]) -> dict[str, Any]:
        """The labels above the threshold, and all probabilities."""
        scores = _probabilities(found, labels)
        return {"labels": sorted(name for name, score in scores.items() if score > THRESHOLD), "scores": scores}


# --- labels ---


def class_label(value: object) -> str:
    """Return the name of a class: a text, a whole number or a boolean. Raises `BadValue`."""
    wanted = "expected a class (text or whole number), got %s"
    if isinstance(value, list):
        raise BadValue("label", "got a list, %s; for several labels pass --task multi-label", value)
    if isinstance(value, float) and not value.is_integer():
        raise BadValue("label", f"{wanted}. Is this regression? Then pass --task regression", value)
    if isinstance(value, str) and not value.strip():
        raise BadValue("label", "the label is empty; fill it in, or remove the row")
    if not isinstance(value, str | int | float):
        raise BadValue("label", wanted, value)
    return str(int(value) if isinstance(value, float) else value)


def tag_list(value: object, name: str) -> list[str]:
    """Return a list of names of classes, none of which is blank. Raises `BadValue`."""
    found = label_list(value, name)
    if not all(map(str.strip, found)):
        raise BadValue(name, "has an empty name in %s; fill it in, or remove it", found)
    return found


def label_list(value: object, name: str) -> list[str]:
    """Return a list of names, also from JSON in a cell. Raises `BadValue`."""
    found = from_json(value)
    if not isinstance(found, list) or not all(isinstance(each, str | int) and each != "" for each in found):
        raise BadValue(name, 'expected a list of texts such as ["a", "b"], got %s', value)
    return [str(each) for each in found]


def labels_of(loaded: Pretrained) -> tuple[str, ...]:
    """The names of a model's classes, in the order of its logits."""
    return tuple(loaded.model.config.id2label[number] for number in range(loaded.model.config.num_labels))


def chosen_class(found: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """The most probable class, and all probabilities, from what a pipeline of transformers answers for a row."""
    scores = _probabilities(found, labels)
    best = max(scores, key=scores.__getitem__)
    return {"label": best, "score": scores[best], "scores": scores}


def _probabilities(found: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, float]:
    """The probability of each class, in the order of ``labels``, from a pipeline's answer for a row."""
    scores = {each["label"]: float(each["score"]) for each in found}
    return {name: scores[name] for name in labels}


# --- tokens ---


def token_limit(loaded: Pretrained, max_length: int) -> int:
    """The greatest number of tokens: ``max_length``, or less if the model or its tokenizer takes less."""
    return int(min(max_length, loaded.processor.model_max_length, positions_of(loaded) or max_length))


def positions_of(loaded: Pretrained) -> int | None:
    """How many tokens the model has positions for; None if its positions are relative, which have no limit."""
    # Not from the config's dict: in GPT-2's, the name is another one.
    found: int | None = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return found


def short_to_long(dataset: Any) -> list[int]:
    """The numbers of encoded rows in the order of their lengths: batches in this order need less padding."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    return sorted(range(len(lengths)), key=lengths.__getitem__)
