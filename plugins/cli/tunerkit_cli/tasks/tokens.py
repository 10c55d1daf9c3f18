"""One class for each word, and F1 of the entities that tags such as ``B-PER`` and ``I-PER`` mark."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

from tunerkit_cli.rows import BadValue, class_numbers
from tunerkit_cli.tasks.base import NOT_LEARNED, Column, Results, Row, Task, first_output, in_order
from tunerkit_cli.tasks.texts import label_list, labels_of, tag_list, token_limit
from tunerkit_transformers.pretrained import Pretrained

_ENTITY_TAG = re.compile(r"O|[BIESLU]-.+")  # IOB2, and IOBES or BILOU, which mark an entity's last and only word too
_PLACE = ("row", "window")  # columns of encoded rows that the model does not take


class TokenClassification(Task):
    """Lists of words, with a tag for each word. A word's first token carries its tag.

    Rows that are longer than the limit are read in windows, of which neighbours share a quarter of their tokens. A
    word that is in two windows counts in the one with more tokens around it.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("tokens", ("words",)),
        Column("tags", ("ner_tags", "labels", "label"), predicted=True),
    )
    main_metric: ClassVar[str] = "f1"
    measures: ClassVar[tuple[str, ...]] = (*Task.measures, "entity_f1")
    label_column: ClassVar[str] = "tags"
    labelled: ClassVar[str] = "token has the tag"
    # Tags bear a higher rate than whole texts: see brown-tags in docs/evidence/quality-record.md.
    defaults: ClassVar[Mapping[str, Any]] = {**Task.defaults, "learning_rate": 2e-3}

    def checked(self, row: Row) -> Row:
        """Words and tags are lists of the same length."""
        found: Row = {"tokens": label_list(row["tokens"], "tokens")}
        if not found["tokens"]:
            raise BadValue("tokens", "the list is empty; remove the row")
        if "tags" in row:
            found["tags"] = tag_list(row["tags"], "tags")
            if len(found["tags"]) != len(found["tokens"]):
                counts = len(found["tokens"]), len(found["tags"])
                raise BadValue(None, "has %s tokens and %s tags; expected one tag each", *counts)
        return found

    def main_metric_of(self, labels: Sequence[str]) -> str:
        """F1 of entities, where the tags mark some."""
        return "entity_f1" if mark_entities(labels) else self.main_metric

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Tokenize the words, a row for each window. Tokens that carry no tag have no label."""
        import datasets

        encoded, samples = self._windows(rows, loaded)
        columns = {**encoded, "row": samples, "window": list(range(len(samples)))}
        if rows and "tags" in rows[0]:
            numbers = [class_numbers(row["tags"], labels_of(loaded)) for row in rows]
            columns["labels"] = [
                [NOT_LEARNED if word is None else numbers[row][word] for word in words]
                for row, words in zip(samples, _carried(encoded, samples), strict=True)
            ]
        return datasets.Dataset.from_dict(columns)

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Pad each batch to its longest text, the labels too, and log metrics, with entities within windows alone."""
        from transformers import DataCollatorForTokenClassification

        collator = DataCollatorForTokenClassification(loaded.processor)
        names = labels_of(loaded)

        def collated(features: Sequence[dict[str, Any]]) -> Any:
            return collator([{name: each[name] for name in each if name not in _PLACE} for each in features])

        def metrics(prediction: Any) -> dict[str, float]:
            logits, truth = first_output(prediction.predictions), prediction.label_ids
            alone = [[window] for window in range(len(truth))]
            return {**self.scores(logits, truth), **_entity_scores(names, logits, truth, alone)}

        return {"data_collator": collated, "compute_metrics": metrics}

    def evaluate(self, trainer: Any, dataset: Any) -> Results:
        """The metrics over all words, and F1 of entities, for which the windows of a row are joined."""
        with in_order(trainer.args):
            found = trainer.predict(dataset)
        logits, truth = first_output(found.predictions), found.label_ids
        rows, windows = list(dataset["row"]), list(dataset["window"])
        order = sorted(range(len(windows)), key=windows.__getitem__)
        joined = [list(group) for _, group in groupby(order, key=rows.__getitem__)]
        names = [trainer.model.config.id2label[number] for number in range(logits.shape[-1])]
        metrics = {**self.scores(logits, truth), **_entity_scores(names, logits, truth, joined)}
        return Results({**metrics, "loss": found.metrics["test_loss"]}, self.confusion(logits, truth))

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """The tag of each word; None for a word without tokens."""
        import torch

        names = labels_of(loaded)
        answers = [{"tokens": row["tokens"], "tags": [None] * len(row["tokens"])} for row in rows]
        encoded, samples = self._windows(rows, loaded)
        carried = _carried(encoded, samples)
        for start in range(0, len(samples), batch_size):
            windows = {name: values[start : start + batch_size] for name, values in encoded.items()}
            inputs = loaded.processor.pad(windows, return_tensors="pt", padding_side="right").to(loaded.model.device)
            with torch.inference_mode():
                chosen = loaded.model(**inputs).logits.argmax(-1).tolist()
            for window, numbers in enumerate(chosen, start=start):
                tags: list[str | None] = answers[samples[window]]["tags"]
                for word, number in zip(carried[window], numbers, strict=False):  # the numbers of padding are over
                    if word is not None:
                        tags[word] = names[number]
        return answers

    def _windows(self, rows: Sequence[Row], loaded: Pretrained) -> tuple[Any, list[int]]:
        """The rows as tokens, in windows, and the row of each window."""
        words = [row["tokens"] for row in rows]
        limit = token_limit(loaded, self.limit)
        shared = max(1, (limit - loaded.processor.num_special_tokens_to_add()) // 4)
        encoded = loaded.processor(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=limit,
            stride=shared,
            return_overflowing_tokens=True,
        )
        return encoded, encoded.pop("overflow_to_sample_mapping")


def _carried(encoded: Any, samples: Sequence[int]) -> list[list[int | None]]:
    """For each token of each window the word whose tag it carries, or None: each word's tag is carried once."""
    best: dict[tuple[int, int], tuple[float, int, int]] = {}
    carried: list[list[int | None]] = []
    for window, row in enumerate(samples):
        words = encoded.word_ids(window)
        carried.append([None] * len(words))
        places = [place for place, word in enumerate(words) if word is not None]
        follows = window > 0 and samples[window - 1] == row
        ends = window + 1 == len(samples) or samples[window + 1] != row
        for place in places:
            if place > 0 and words[place] == words[place - 1]:
                continue  # a further token of the word
            around = min(place - places[0] if follows else math.inf, math.inf if ends else places[-1] - place)
            # A window may begin in the middle of a word, whose first token then counts in the window before it.
            if around > best.get((row, words[place]), (-1,))[0]:
                best[row, words[place]] = (around, window, place)
    for (_, word), (_, window, place) in best.items():
        carried[window][place] = word
    return carried


def mark_entities(names: Sequence[str]) -> bool:
    """Whether tags mark entities, as ``B-PER``, ``I-PER`` and ``O`` do."""
    return all(map(_ENTITY_TAG.fullmatch, names)) and any(name.startswith(("B-", "I-", "S-", "U-")) for name in names)


def entities(tags: Iterable[str]) -> set[tuple[str, int, int]]:
    """The entities in the tags of a row: kind, first word, and the word after the last, as in seqeval and conlleval."""
    found, kind, start, before = set(), "", 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if before in "BI" and mark in "IEL" and name == kind:
            before = mark
            continue
        if before != "O":
            found.add((kind, start, place))
        kind, start, before = name, place, mark
    return found


def _entity_scores(names: Sequence[str], logits: Any, truth: Any, joined: Sequence[Sequence[int]]) -> dict[str, float]:
    """F1 of entities that have the right words and kind, of windows that are joined to rows; none for other tags."""
    if not mark_entities(names):
        return {}
    both, all_of_them = 0, 0
    for windows in joined:
        kept = [(window, place) for window in windows for place in (truth[window] != NOT_LEARNED).nonzero()[0]]
        wanted = entities(names[truth[place]] for place in kept)
        given = entities(names[logits[place].argmax()] for place in kept)
        both += len(wanted & given)
        all_of_them += len(wanted) + len(given)
    return {"entity_f1": 2 * both / all_of_them if all_of_them else 0.0}
