"""One class for each image."""

import filecmp
import os
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs

from tunerkit_cli.rows import BadValue, DataError, Table, class_numbers
from tunerkit_cli.tasks.base import LABEL, Column, Row, Task, name_in, pipeline_of, require_package
from tunerkit_cli.tasks.texts import chosen_class, class_label, labels_of
from tunerkit_transformers.pretrained import Pretrained

_START: Final = 8192  # bytes


class ImageClassification(Task):
    """Image files with one of several classes: a folder with a subfolder per class, or a file with their paths."""

    columns: ClassVar[tuple[Column, ...]] = (Column("image", ("image_path", "file_name", "path")), LABEL)
    main_metric: ClassVar[str] = "accuracy"
    label_column: ClassVar[str] = LABEL.name
    one_class: ClassVar[bool] = True
    # Images bear a higher rate than texts. The trainer keeps their column, which the transform reads.
    defaults: ClassVar[Mapping[str, Any]] = {**Task.defaults, "learning_rate": 2e-3, "remove_unused_columns": False}

    def rows(self, table: Table, names: Mapping[str, str], **options: bool) -> list[Row]:
        """The rows, with paths that are relative to the working folder."""
        name = name_in(table, self.columns[0], names)
        placed = tuple({**row, name: _placed(table.folder, row.get(name))} for row in table.rows)
        return super().rows(attrs.evolve(table, rows=placed), names, **options)

    def checked(self, row: Row) -> Row:
        """The file exists, and begins as an image."""
        path = row["image"]
        if not isinstance(path, str) or not os.path.isfile(path):  # Path.is_file raises where a name is too long
            do = "write the paths of image files, relative to the folder of the data"
            raise BadValue("image", f"there is no file %s; {do}", path)
        require_package("PIL", f"the task {self.name}", "vision")
        with opened(path):
            pass
        return {"image": path, **({"label": class_label(row["label"])} if "label" in row else {})}

    def identity(self, row: Row) -> Hashable:
        """The content of the file: copies of an image have other paths."""
        with open(row["image"], "rb") as file:
            start = hash((os.path.getsize(row["image"]), file.read(_START)))
        return _Content(start, row["image"])

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

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """Log the metrics."""
        from transformers import DefaultDataCollator

        return {"compute_metrics": self.compute_metrics, "data_collator": DefaultDataCollator()}

    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """Predict with the pipeline of transformers."""
        labels, files = labels_of(loaded), [row["image"] for row in rows]
        found = pipeline_of(self.name, loaded)(files, batch_size=batch_size, top_k=len(labels))
        return [{"image": file, **chosen_class(each, labels)} for file, each in zip(files, found, strict=True)]


@attrs.frozen
class _Content:
    """A file's content. It is read whole only to compare it with a file of its size that begins alike."""

    start: int
    path: str = attrs.field(eq=attrs.cmp_using(eq=partial(filecmp.cmp, shallow=False)), hash=False)


def _placed(folder: Path | None, path: object) -> object:
    """A path of a data file as seen from the working folder; one that is not in the file's folder stays as it is."""
    inside = os.path.join(folder or "", path) if isinstance(path, str) else ""
    return inside if os.path.isfile(inside) else path


def opened(path: str) -> Any:
    """Open an image file, which reads its size but not its pixels. Raises `BadValue`."""
    from PIL import Image

    try:
        return Image.open(path)
    except OSError as problem:  # Pillow's error for a file that is no image is one
        raise BadValue("image", "%s cannot be read as an image; remove the file, or save it again", path) from problem


def _decoded(path: str) -> Any:
    with opened(path) as image:
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError) as problem:  # Pillow's errors for a damaged file
            raise DataError(f"{path} is damaged: {problem}; remove the file, or save it again") from problem
