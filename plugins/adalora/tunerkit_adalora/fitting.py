"""Starts of Q that are fitted to data: the main directions of a layer's inputs (EVA), or of its gradient."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tunerkit.plugin import Statistics, StatisticsRequest, StepError, Tuner
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.svd_layer import SvdLayer

# Directions that are measured for each triplet, and at least: an approximation is good far from its end.
_EXCESS, _LEAST = 4, 64


def request(config: AdaLoraConfig) -> StatisticsRequest | None:
    """What a start needs to know of the data; None for nothing."""
    if config.start not in ("eva", "gradients"):
        return None
    measured = max(_EXCESS * config.initial_rank, _LEAST)
    return StatisticsRequest(inputs=measured) if config.start == "eva" else StatisticsRequest(gradients=measured // 2)


def refuse_unfitted(tuner: Tuner) -> None:
    """Raise `StepError` if an adapter is about to train whose start needs data and got none."""
    config, progress = tuner.config, tuner.progress
    assert isinstance(config, AdaLoraConfig)
    if request(config) is not None and progress.calibration is None and not progress.loaded:
        raise StepError(
            f"start {config.start!r} is set by data, and adapter {tuner.name!r} got none: call "
            "tunerkit.calibrate(model, batches) between wrap and attach"
        )


def fit_(tuner: Tuner, statistics: Mapping[str, Statistics]) -> None:
    """Set every Q. P stays 0 and Λ 1, and the ranks are those of the schedule, which moves them during training."""
    for path, layer in tuner.adapters().items():
        assert isinstance(layer, SvdLayer)
        found = directions(statistics[path])[: len(layer.q)].to(layer.q)
        layer.q[: len(found)].copy_(found)  # what the data do not say stays random


def directions(found: Statistics) -> Tensor:
    """The main directions as rows of length 1, (k, in), the first first: principal components, or singular vectors."""
    if found.centred is not None:
        return unit_rows(found.centred)
    assert found.gradients is not None  # one of the two was asked for
    return found.gradients.triplets()[2]


def unit_rows(rows: Tensor) -> Tensor:
    """The rows that are not 0, each divided by its length."""
    lengths = torch.linalg.vector_norm(rows, dim=1)
    kept: Tensor = rows[lengths > 0] / lengths[lengths > 0, None]
    return kept
