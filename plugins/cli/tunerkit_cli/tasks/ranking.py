"""How embeddings are made and trained: sentence-transformers' pooling and loss, around a model of transformers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from tunerkit.errors import ConfigError
from tunerkit_transformers import transformers_private
from tunerkit_transformers.pretrained import LOADING, ModelError, Pretrained, reason_of

SIDES: Final = ("query", "document")  # sentence-transformers' names of anchors, and of what is ranked for them


def embedder_of(loaded: Pretrained, limit: int) -> SentenceTransformer:
    """Return the loaded model with the prompts, pooling and layers that its base's files name. Raises `ModelError`."""
    known: Any = {"revision": loaded.revision, "local_files_only": Path(loaded.source).is_dir()}
    try:
        found = SentenceTransformer(loaded.source, device="cpu", model_kwargs={"dtype": loaded.model.dtype}, **known)
    except LOADING as problem:
        raise ModelError(f"sentence-transformers cannot load {loaded.source!r}: {reason_of(problem)}") from problem
    first: Any = found[0]
    kind, ours = type(getattr(first, "model", first)), type(loaded.model)
    if kind is not ours or first.module_output_name != "token_embeddings":
        raise ModelError(
            f"sentence-transformers makes embeddings of {loaded.source!r} with a {kind.__name__}, and the adapter is "
            f"trained in a {ours.__name__}; pass a --model of texts alone"
        )
    if first.tokenizer.pad_token is None:  # as of many decoders
        first.tokenizer.pad_token = loaded.processor.pad_token
    found.requires_grad_(False).eval()
    first.model = loaded.model
    found.max_seq_length = min(limit, found.max_seq_length or limit)
    return found


class RankingTrainer(Trainer):
    """Trains a model such that each anchor's own positive is nearer than the other rows' texts and its negative."""

    def __init__(self, *, embedder: SentenceTransformer, **settings: Any) -> None:
        super().__init__(data_collator=self.collated, **settings)
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch
        self.embedder, processes = embedder, self.args.world_size
        # In several processes the other rows of a batch are those of all; an evaluation is as in one process.
        self.ranking = MultipleNegativesRankingLoss(embedder, gather_across_devices=processes > 1)
        self.measuring = MultipleNegativesRankingLoss(embedder)
        self.pooling = nn.Sequential(*list(embedder)[1:]).to(self.args.device)
        rows: Any = self.train_dataset
        self.of_pairs = "negative" not in rows.column_names
        if self.args.train_batch_size * processes < 2 and self.of_pairs:
            why = "the other rows of a batch are the negatives of each"
            raise ConfigError([f"training.per_device_train_batch_size: pairs need at least 2, got 1; {why}"])
        transformers_private.sample_by_(self, self._distinct)

    def _distinct(self, rows: Any = None) -> "Distinct":
        arguments = self.args
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        size = arguments.train_batch_size * arguments.world_size
        return Distinct(self.train_dataset if rows is None else rows, size, seed, of_pairs=self.of_pairs)

    def collated(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tokenize a batch: its anchors, and its documents one column after the other."""
        documents = [name for name in rows[0] if name in ("positive", "negative")]
        texts = [row["anchor"] for row in rows], [row[name] for name in documents for row in rows]
        batch: dict[str, Any] = {"labels": torch.tensor([row["labels"] for row in rows])}
        for side, own in zip(SIDES, texts, strict=True):
            batch[side] = self.embedder.preprocess(own, prompt=self.embedder.prompts.get(side), task=side)
        return batch

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and the embeddings (rows, columns, size) if they are asked for."""
        anchors, documents = (self._embeddings(model, inputs[side]) for side in SIDES)
        columns = [anchors, *documents.split(len(anchors))]
        if model.training:
            loss = self.ranking.compute_loss_from_embeddings(columns, inputs["labels"])
        else:
            rows = inputs["labels"].tolist()
            first = [n for n, row in enumerate(rows) if row not in rows[:n]]  # the others may only fill the batch up
            loss = self.measuring.compute_loss_from_embeddings([each[first] for each in columns], inputs["labels"])
        return (loss, {"embeddings": torch.stack(columns, dim=1)}) if return_outputs else loss

    def _embeddings(self, model: Any, features: Mapping[str, Any]) -> Tensor:
        """The embeddings (texts, size) of tokenized texts, by the model as the trainer has wrapped it."""
        inputs = {name: features[name] for name in self.embedder.tokenizer.model_input_names if name in features}
        found = {**features, "token_embeddings": model(**inputs)["last_hidden_state"]}
        embeddings: Tensor = self.pooling(found)["sentence_embedding"]
        return embeddings


class Distinct(Sampler[int]):
    """Draws rows such that no text is twice in a batch, as far as possible: it would be a wrong answer beside itself.

    Rows that fill no batch without such a text come last. A pair that would be alone in the last batch is left out, as
    there is nothing to learn without other rows. The order depends on the seed and the epoch, which accelerate sets.
    """

    def __init__(self, rows: Any, size: int, seed: int, *, of_pairs: bool) -> None:
        self.size, count = size, len(rows)
        self.count = count - (of_pairs and count > size and count % size == 1)
        self.batches = NoDuplicatesBatchSampler(
            rows, size, drop_last=False, valid_label_columns=["labels"], generator=torch.Generator(), seed=seed
        )

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from now on."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        # The trainer makes batches of the rows one after the other: a smaller one would move the borders of the others.
        batches = sorted(self.batches, key=lambda batch: len(batch) < self.size)
        return islice(chain.from_iterable(batches), self.count)
