"""One class for each word."""

from collections.abc import Sequence
from typing import Any, ClassVar

from tunerkit.cli.rows.labels import class_names, class_numbers
from tunerkit.cli.rows.reading import DataError
from tunerkit.cli.tasks.base import Column, Row, Task
from tunerkit.cli.tasks.classifying import classification_scores, confusion_of
from tunerkit.cli.tasks.multi_label import label_list
from tunerkit.cli.tasks.texts import labels_of, token_limit
from tunerkit.integrations.pretrained import Pretrained

IGNORED = -100  # the label that the loss leaves out, as in torch and transformers


class TokenClassification(Task):
    """Lists of words, with a tag for each word. A word's first token carries its tag."""

    name: ClassVar[str] = "token-classification"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tokens", ("words",)),
        Column("tags", ("ner_tags", "labels", "label"), predicted=True),
    )
    main_metric: ClassVar[str] = "f1"
    greater_is_better: ClassVar[bool] = True

    def checked(self, row: Row, where: str) -> Row:
        """Words and tags are lists of the same length."""
        found: Row = {"tokens": label_list(row["tokens"], where, "tokens")}
        if not found["tokens"]:
            raise DataError(f"{where}, column 'tokens': the list is empty; remove the row")
        if "tags" in row:
            found["tags"] = label_list(row["tags"], where, "tags")
            if len(found["tags"]) != len(found["tokens"]):
                raise DataError(
                    f"{where}: has {len(found['tokens'])} tokens and {len(found['tags'])} tags; expected one tag each"
                )
        return found

    def labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """All tags."""
        names = class_names(tag for row in rows for tag in row["tags"])
        if len(names) < 2:
            raise DataError(f"every token has the tag {names[0]!r}; a classifier needs at least two classes")
        return names

    def classes_of(self, row: Row) -> Sequence[str]:
        """The tags of all words."""
        tags: list[str] = row["tags"]
        return tags

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Tokenize the words. Further tokens of a word, and special tokens, have no label."""
        import datasets

        encoded = self._tokenized(rows, loaded)
        columns = dict(encoded)
        if rows and "tags" in rows[0]:
            numbers = [class_numbers(row["tags"], labels_of(loaded)) for row in rows]
            columns["labels"] = [
                [IGNORED if word is None else own[word] for word in _firsts(encoded.word_ids(number))]
                for number, own in enumerate(numbers)
            ]
        return datasets.Dataset.from_dict(columns)

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Pad each batch to its longest text, the labels too, and log the metrics."""
        from transformers import DataCollatorForTokenClassification

        collator = DataCollatorForTokenClassification(loaded.processor)
        return {"data_collator": collator, "compute_metrics": self.compute_metrics}

    def scores(self, predictions: Any, truth: Any) -> dict[str, float]:
        """Accuracy and macro F1 over all words."""
        kept = truth != IGNORED
        return classification_scores(predictions[kept], truth[kept])

    def confusion(self, predictions: Any, truth: Any) -> list[list[int]]:
        """Words by true tag, columns by predicted tag."""
        kept = truth != IGNORED
        return confusion_of(predictions[kept], truth[kept])

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """The tag of each word that fits into the model's length; None for a word without tokens."""
        import torch

        names, answers = labels_of(loaded), []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            encoded = self._tokenized(batch, loaded)
            inputs = loaded.processor.pad(encoded, return_tensors="pt", padding_side="right").to(loaded.model.device)
            with torch.inference_mode():
                chosen = loaded.model(**inputs).logits.argmax(-1).tolist()
            for number, row in enumerate(batch):
                firsts = enumerate(_firsts(encoded.word_ids(number)))
                tags = {word: names[chosen[number][place]] for place, word in firsts if word is not None}
                words = row["tokens"][: max(tags, default=-1) + 1]
                answers.append({"tokens": words, "tags": [tags.get(word) for word in range(len(words))]})
        return answers

    def _tokenized(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        words = [row["tokens"] for row in rows]
        limit = token_limit(loaded, self.limit)
        return loaded.processor(words, is_split_into_words=True, truncation=True, max_length=limit)


def _firsts(words: Sequence[int | None]) -> list[int | None]:
    """Each token's word, where it is the word's first token, else None."""
    return [word if place == 0 or words[place - 1] != word else None for place, word in enumerate(words)]
