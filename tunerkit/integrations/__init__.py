"""Trainers and engines that models are trained with. Each module imports its library, so import it where it is used."""

from tunerkit.libraries import TRAINER, derives_from


def is_trainer(candidate: object) -> bool:
    """Whether ``candidate`` is a transformers (or TRL) Trainer, asked without importing transformers."""
    return derives_from(candidate, TRAINER)
