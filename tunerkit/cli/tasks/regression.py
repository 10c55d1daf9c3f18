"""One number for each text."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from tunerkit.cli.rows.reading import DataError
from tunerkit.cli.tasks.base import Results, Row
from tunerkit.cli.tasks.texts import TextTask
from tunerkit.errors import shown


class Regression(TextTask):
    """Texts, or pairs of texts, with a number."""

    name: ClassVar[str] = "regression"
    has_baseline: ClassVar[bool] = False

    def label(self, value: object, where: str) -> float:
        """A finite number."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{where}, column 'label': regression needs a finite number, got {shown(value)}")
        return number

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[float]:
        """The numbers."""
        return [row["label"] for row in rows]

    def evaluate(self, trainer: Any, dataset: Any, rows: Sequence[Row], labels: Sequence[str]) -> Results:
        """Mean squared error (the loss), mean absolute error, and R²."""
        from sklearn.metrics import mean_absolute_error, r2_score

        found = trainer.predict(dataset)
        predicted = found.predictions.reshape(-1)
        metrics = {"loss": found.metrics["test_loss"], "mae": float(mean_absolute_error(found.label_ids, predicted))}
        if len(rows) > 1:
            metrics["r2"] = float(r2_score(found.label_ids, predicted))
        return Results(metrics)

    def pipeline_options(self) -> dict[str, Any]:
        """The number as it is."""
        return {"function_to_apply": "none"}

    def prediction(self, found: Any) -> dict[str, Any]:
        """The number."""
        return {"value": float(found["score"])}
