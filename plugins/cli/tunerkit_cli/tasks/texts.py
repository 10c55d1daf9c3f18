"""What tasks on single texts share: encoding, padding and the pipeline's predictions."""

from collections.abc import Sequence
from typing import Any, ClassVar

from tunerkit_cli.tasks.base import LABEL, TEXT, Column, Row, Task, pipeline_of, require_text
from tunerkit_transformers.pretrained import Pretrained

PAIR = Column("text_pair", ("sentence2", "hypothesis", "question"), needed=False)


class TextTask(Task):
    """A task whose rows are a text, or a pair of texts, and a label."""

    columns: ClassVar[tuple[Column, ...]] = (TEXT, PAIR, LABEL)
    has_baseline: ClassVar[bool] = True
    label_column: ClassVar[str] = "label"

    def checked(self, row: Row, where: str) -> Row:
        """Check the texts and the label."""
        texts: Row = {name: require_text(row, name, where) for name in ("text", "text_pair") if name in row}
        return {**texts, **({"label": self.label(row["label"], where)} if "label" in row else {})}

    def label(self, value: object, where: str) -> Any:
        """Return a label of the task's type. Raises `DataError`."""
        raise NotImplementedError

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[Any]:
        """The labels as the model's loss takes them."""
        raise NotImplementedError

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Tokenize, truncate to `limit` tokens or the model's limit, and number the labels."""
        import datasets

        encoded = dict(tokenize(rows, loaded, self.limit))
        if rows and "label" in rows[0]:
            encoded["labels"] = self.targets(rows, labels_of(loaded))
        return datasets.Dataset.from_dict(encoded)

    @property
    def defaults(self) -> dict[str, Any]:
        """Texts of similar length share a batch, which saves padding."""
        return {**super().defaults, "train_sampling_strategy": "group_by_length"}

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Pad each batch to its longest text, and log the metrics."""
        from transformers import DataCollatorWithPadding

        return {"data_collator": DataCollatorWithPadding(loaded.processor), "compute_metrics": self.compute_metrics}

    def pipeline_options(self) -> dict[str, Any]:
        """The options of the pipeline's call."""
        return {}

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """Predict with the pipeline of transformers."""
        inputs = [{key: row[key] for key in ("text", "text_pair") if key in row} for row in rows]
        pipeline = pipeline_of(self.name, loaded)
        limit = token_limit(loaded, self.limit)
        found = pipeline(inputs, batch_size=batch_size, truncation=True, max_length=limit, **self.pipeline_options())
        return [self.prediction(each, labels_of(loaded)) for each in found]

    def prediction(self, found: Any, labels: Sequence[str]) -> dict[str, Any]:
        """One row's prediction, from the pipeline's answer."""
        raise NotImplementedError


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


def tokenize(rows: Sequence[Row], loaded: Pretrained, max_length: int) -> Any:
    """Tokenize texts or pairs of texts, truncated."""
    texts = [[row[name] for row in rows] for name in ("text", "text_pair") if rows and name in rows[0]]
    return loaded.processor(*texts, truncation=True, max_length=token_limit(loaded, max_length))


def labels_of(loaded: Pretrained) -> tuple[str, ...]:
    """The names of a model's classes, in the order of its logits."""
    return tuple(loaded.model.config.id2label[number] for number in range(loaded.model.config.num_labels))
