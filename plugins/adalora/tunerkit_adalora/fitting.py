"""Initialization of Q from data: the principal directions of a layer's inputs (EVA), or of its gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tunerkit.plugin import Statistics, StepError, Tuner
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.svd_layer import SvdLayer


def refuse_unfitted(tuner: Tuner) -> None:
    """Raise `StepError` if the adapter was neither calibrated nor loaded. Call it if the initialization needs data."""
    config, progress = tuner.config, tuner.progress
    assert isinstance(config, AdaLoraConfig)
    if progress.calibration is None and not progress.loaded:
        raise StepError(
            f"start {config.start!r} is computed from data, but adapter {tuner.name!r} was not calibrated: call "
            "tunerkit.calibrate(model, batches) between wrap and attach"
        )


def fit_(tuner: Tuner, statistics: Mapping[str, Statistics]) -> None:
    """Initialize every Q from the statistics. P stays 0 and Λ 1; the schedule allocates ranks during training."""
    for path, layer in tuner.adapters().items():
        assert isinstance(layer, SvdLayer)
        found = directions(statistics[path])[: len(layer.q)].to(layer.q)
        layer.q[: len(found)].copy_(found)  # the other rows stay random


def directions(found: Statistics) -> Tensor:
    """Return principal components of inputs, or right singular vectors of the gradient, as unit rows (k, in)."""
    if found.centred is not None:
        return unit_rows(found.centred)
    assert found.gradients is not None  # one of the two was requested
    return found.gradients.triplets()[2]


def unit_rows(rows: Tensor) -> Tensor:
    """Return the nonzero rows, each divided by its length."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    kept: Tensor = rows[lengths > 0] / lengths[lengths > 0, None]
    return kept
