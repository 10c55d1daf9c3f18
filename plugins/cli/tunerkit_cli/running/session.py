"""A run that is ready to train."""

from collections.abc import Mapping
from typing import Any

import attrs

from tunerkit import Tuner
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.running.callbacks import Watching
from tunerkit_cli.running.data import Data
from tunerkit_cli.running.fitting import Fit
from tunerkit_cli.running.starting import Start
from tunerkit_cli.tasks.base import Task
from tunerkit_transformers.pretrained import Pretrained


@attrs.frozen(eq=False)
class Session:
    """A run that is ready to train.

    ``start`` is the adapter that it goes on from, or None if it trains a new one. ``fits`` says how the rows of
    ``train`` and ``eval`` fit a language model.
    """

    recipe: Recipe
    task: Task
    data: Data
    loaded: Pretrained
    tuner: Tuner
    trainer: Any
    watching: Watching
    start: Start | None
    fits: Mapping[str, Fit]

    def rows(self, part: str) -> int:
        """How many rows of ``"train"`` or ``"eval"`` count: those that leave something to learn."""
        missing = self.fits[part].missing if part in self.fits else 0
        return len(self.data.parts[part]) - missing

    @property
    def precision(self) -> str:
        """What matrix products are computed in."""
        arguments = self.trainer.args
        return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
