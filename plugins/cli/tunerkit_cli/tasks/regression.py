"""One number for each text."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from tunerkit.errors import shown
from tunerkit_cli.rows.reading import DataError
from tunerkit_cli.tasks.base import Row
from tunerkit_cli.tasks.texts import TextTask


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

    def guess_loss(self, rows: Sequence[Row]) -> float | None:
        """The variance of the numbers: the loss of answering with their mean."""
        import numpy

        with numpy.errstate(over="ignore", invalid="ignore"):  # numbers near 1e200 have squares that are infinite
            return float(numpy.var([row["label"] for row in rows]))

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[float]:
        """The numbers."""
        return [row["label"] for row in rows]

    def scores(self, predictions: Any, truth: Any) -> dict[str, float]:
        """Mean absolute error and R², which needs two rows; the loss is the mean squared error."""
        from sklearn.metrics import mean_absolute_error, r2_score

        predicted = predictions.reshape(-1)
        scores = {"mae": float(mean_absolute_error(truth, predicted))}
        return {**scores, **({"r2": float(r2_score(truth, predicted))} if len(truth) > 1 else {})}

    def pipeline_options(self) -> dict[str, Any]:
        """The number as it is."""
        return {"function_to_apply": "none"}

    def prediction(self, found: Any, labels: Sequence[str]) -> dict[str, Any]:
        """The number."""
        return {"value": float(found["score"])}
