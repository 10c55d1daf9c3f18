"""One text for another one: translation, summaries."""

from collections.abc import Sequence
from typing import Any, ClassVar

from tunerkit_cli.tasks.answering import Answering
from tunerkit_cli.tasks.base import Column, Row, require_text
from tunerkit_cli.tasks.generating import GREEDY, SAMPLES, GenerationTask, generate
from tunerkit_cli.tasks.texts import token_limit
from tunerkit_transformers.pretrained import Pretrained


class Seq2Seq(GenerationTask):
    """Rows with ``source`` and ``target``."""

    name: ClassVar[str] = "seq2seq"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("source", ("input", "text", "document")),
        Column("target", ("output", "summary", "translation"), predicted=True),
    )
    max_length: ClassVar[int] = 256

    def checked(self, row: Row, where: str) -> Row:
        """Both are texts."""
        return {name: require_text(row, name, where) for name in row}

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Tokenize sources and targets, each truncated."""
        import datasets

        targets = [row["target"] for row in rows] if rows and "target" in rows[0] else None
        limit = token_limit(loaded, self.limit)
        encoded = loaded.processor(
            [row["source"] for row in rows], text_target=targets, truncation=True, max_length=limit
        )
        return datasets.Dataset.from_dict(dict(encoded))

    @property
    def defaults(self) -> dict[str, Any]:
        """Encoder-decoder models are trained longer than other language models, at a higher rate."""
        return {**super().defaults, "num_train_epochs": 3, "learning_rate": 1e-3}

    def trainer_classes(self) -> tuple[type[Any], type[Any]]:
        """The trainer of transformers for encoder-decoder models."""
        from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

        return Seq2SeqTrainer, Seq2SeqTrainingArguments

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Pad sources and targets, and shift the targets for the decoder."""
        from transformers import DataCollatorForSeq2Seq

        return {"data_collator": DataCollatorForSeq2Seq(loaded.processor, model=loaded.model)}

    def samples(self, loaded: Pretrained, rows: Sequence[Row]) -> list[dict[str, str]]:
        """What the first three held-out sources become."""
        sources = [row["source"] for row in rows[:SAMPLES]]
        answers = self._written(loaded, sources, SAMPLES, GREEDY) if sources else []
        return [{"prompt": text, "answer": answer} for text, answer in zip(sources, answers, strict=True)]

    def predict(
        self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int, answering: Answering = GREEDY
    ) -> list[dict[str, Any]]:
        """Generate each target."""
        targets = self._written(loaded, [row["source"] for row in rows], batch_size, answering)
        return [{"target": text} for text in targets]

    def _written(self, loaded: Pretrained, sources: Sequence[str], batch_size: int, answering: Answering) -> list[str]:
        """What the model writes for sources, which are cut as in training."""
        limit = token_limit(loaded, self.limit)
        return generate(loaded, sources, batch_size=batch_size, answering=answering, max_length=limit)
