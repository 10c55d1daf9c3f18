"""One class for each image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tunerkit.cli.rows.labels import class_numbers
from tunerkit.cli.rows.reading import DataError
from tunerkit.cli.tasks.base import LABEL, Column, Results, Row, Task, pipeline_of, require_package
from tunerkit.cli.tasks.classifying import accuracy_of, classification_results
from tunerkit.cli.tasks.text_classification import class_label, several_classes
from tunerkit.cli.tasks.texts import labels_of
from tunerkit.errors import shown
from tunerkit.integrations.pretrained import Pretrained


class ImageClassification(Task):
    """Image files with one of several classes: a folder with a subfolder per class, or a file with their paths."""

    name: ClassVar[str] = "image-classification"
    columns: ClassVar[tuple[Column, ...]] = (Column("image", ("image_path", "file_name", "path")), LABEL)
    main_metric: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True

    def checked(self, row: Row, where: str) -> Row:
        """The file exists, and begins as an image."""
        path = row["image"]
        if not isinstance(path, str) or not Path(path).is_file():
            raise DataError(f"{where}, column 'image': there is no file {shown(path)}; write the paths of image files")
        require_package("PIL", self.name, "vision")
        with opened(path):
            pass
        return {"image": path, **({"label": class_label(row["label"], where)} if "label" in row else {})}

    def labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The classes."""
        return several_classes(rows)

    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Images are read and processed when a batch needs them."""
        import datasets

        columns: dict[str, Any] = {"image": [row["image"] for row in rows]}
        if rows and "label" in rows[0]:
            columns["labels"] = class_numbers((row["label"] for row in rows), labels_of(loaded))

        def processed(batch: dict[str, Any]) -> dict[str, Any]:
            found = dict(loaded.processor([_decoded(path) for path in batch["image"]], return_tensors="pt"))
            return {**found, **({"labels": batch["labels"]} if "labels" in batch else {})}

        return datasets.Dataset.from_dict(columns).with_transform(processed)

    @property
    def defaults(self) -> dict[str, Any]:
        """The trainer keeps the column with the images, which the transform reads."""
        return {**super().defaults, "remove_unused_columns": False}

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Log the accuracy."""
        from transformers import DefaultDataCollator

        return {"compute_metrics": accuracy_of, "data_collator": DefaultDataCollator()}

    def evaluate(self, trainer: Any, dataset: Any, rows: Sequence[Row], labels: Sequence[str]) -> Results:
        """Accuracy, macro F1 and the confusion matrix."""
        found = trainer.predict(dataset)
        predicted = found.predictions.argmax(-1)
        return classification_results(found.label_ids, predicted, len(labels), found.metrics["test_loss"])

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """Predict with the pipeline of transformers."""
        found = pipeline_of(self.name, loaded)([row["image"] for row in rows], batch_size=batch_size, top_k=1)
        return [{"label": each[0]["label"], "score": float(each[0]["score"])} for each in found]


def opened(path: str) -> Any:
    """Open an image file, which reads its size but not its pixels. Raises `DataError`."""
    from PIL import Image

    try:
        return Image.open(path)
    except OSError as problem:  # Pillow's error for a file that is no image is one
        raise DataError(f"{path} cannot be read as an image; remove the file, or save it again") from problem


def _decoded(path: str) -> Any:
    with opened(path) as image:
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError) as problem:  # Pillow's errors for a damaged file
            raise DataError(f"{path} is damaged: {problem}; remove the file, or save it again") from problem
