"""Texts as vectors: pairs of texts that belong together, perhaps with a third one that does not."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tunerkit.errors import shown
from tunerkit_cli.rows import DataError, Table
from tunerkit_cli.tasks.base import Column, Row, Task, name_in, require_package
from tunerkit_cli.tasks.texts import token_limit
from tunerkit_transformers.pretrained import Pretrained

_GRADES = ("label", "score")
_NEAREST = 10  # the documents that the mean reciprocal rank looks at


class Embedding(Task):
    """Anchors, their positives, and perhaps a negative each; the texts of a batch's other rows are negatives too."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("anchor", ("query",)),
        Column("positive"),
        Column("negative", needed=False),
    )
    main_metric: ClassVar[str] = "accuracy"
    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "mrr", "triplet_accuracy")
    base_can: ClassVar[bool] = True
    max_length: ClassVar[int] = 512
    trainer: ClassVar[tuple[str, str]] = ("tunerkit_cli.tasks.ranking:RankingTrainer", Task.trainer[1])
    batch_counts: ClassVar[bool] = True
    # The trainer keeps the columns, which are tokenized batch by batch.
    defaults: ClassVar[Mapping[str, Any]] = {**Task.defaults, "remove_unused_columns": False}

    def columns_for(self, table: Table, names: Mapping[str, str], *, predicting: bool) -> Sequence[Column]:
        """All of them; to predict, those that are there. Raises `DataError` for pairs that may not belong together."""
        if not predicting and (graded := next((name for name in _GRADES if name in table.columns), None)):
            raise DataError(
                f"{table.source}: has {shown(graded)}, and {self.name} takes each positive for one that belongs to its "
                "anchor; keep the rows of such pairs, and leave the column out"
            )
        there = [each for each in self.columns if name_in(table, each, names) in table.columns]
        return there if predicting and there else self.columns[: 1 if predicting else None]

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """The texts, which the trainer tokenizes, and as labels a number for each, the same for the same text."""
        import datasets

        numbers: dict[str, int] = {}
        labels = [[numbers.setdefault(text, len(numbers)) for text in row.values()] for row in rows]
        return datasets.Dataset.from_dict({**{name: [row[name] for row in rows] for name in rows[0]}, "labels": labels})

    def trainer_classes(self) -> tuple[type[Any], type[Any]]:
        require_package("sentence_transformers", f"the task {self.name}", self.name)
        return super().trainer_classes()

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Log the metrics."""
        return {"embedder": self._embedder(loaded), "compute_metrics": self.compute_metrics}

    def _embedder(self, loaded: Pretrained) -> Any:
        require_package("sentence_transformers", f"the task {self.name}", self.name)
        from tunerkit_cli.tasks.ranking import embedder_of

        return embedder_of(loaded, token_limit(loaded, self.limit))

    def scores(self, predictions: Any, truth: Any) -> dict[str, float]:
        """Rank all positives and negatives for each anchor, by the cosine of embeddings (rows, columns, size).

        Accuracy is the share of anchors whose nearest document is one of their positives, and MRR the mean of 1 / rank
        of the first one, 0 beyond the nearest ten. For triplets, also the share of positives that are nearer than their
        negatives.
        """
        import numpy
        import torch
        from sentence_transformers.util import pairwise_cos_sim, semantic_search

        vectors = torch.from_numpy(predictions).float()
        anchors, first = numpy.unique(truth[:, 0], return_index=True)
        documents, place = numpy.unique(truth[:, 1:], return_index=True)  # of all columns, one row after the other
        right = {*map(tuple, truth[:, :2].tolist())}
        found = semantic_search(vectors[first, 0], vectors[:, 1:].flatten(0, 1)[place], top_k=_NEAREST)
        ranks = [
            next(
                (n for n, hit in enumerate(hits, start=1) if (anchor, documents[int(hit["corpus_id"])]) in right),
                math.inf,
            )
            for anchor, hits in zip(anchors, found, strict=True)
        ]
        scores = {"accuracy": ranks.count(1) / len(ranks), "mrr": sum(1 / rank for rank in ranks) / len(ranks)}
        if vectors.shape[1] > 2:
            near, far = (pairwise_cos_sim(vectors[:, 0], vectors[:, column]) for column in (1, 2))
            scores["triplet_accuracy"] = float((near > far).float().mean())
        return scores

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """The embedding of each text, under the name of its column."""
        embedder, found = self._embedder(loaded), {}
        for name in rows[0]:
            encode = embedder.encode_query if name == "anchor" else embedder.encode_document
            found[name] = encode([row[name] for row in rows], batch_size=batch_size, show_progress_bar=False).tolist()
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    def save_merged(self, loaded: Pretrained, folder: Path) -> None:
        """As sentence-transformers reads it, with the base's prompts and pooling."""
        self._embedder(loaded).save_pretrained(str(folder), create_model_card=False)
