"""What the processes of a training do together, as a plugin says; a process that nobody knows of trains alone."""

import os
from collections.abc import Sequence

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.engine import Alone, Engine
from tunerkit.errors import StepError, shown
from tunerkit.extras import ENGINES, distribution, install
from tunerkit.injection import Tuner


def engine_for(
    tuners: Sequence[Tuner], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object]:
    """Find out what the processes do together, and what takes the step hooks.

    Args:
        tuners: The adapters that are trained.
        model: The model that runs, which may be around the wrapped one.
        candidate: The optimizer, or what a library has instead.
        data_parallel: What `tunerkit.attach` was given.

    Returns:
        The engine; and ``candidate``, or the optimizer that stands for it.

    Raises:
        StepError: There is a process group, and no plugin that keeps its adapters alike.
    """
    if data_parallel not in (None, False, True):
        raise StepError(f"data_parallel: expected True, False or None, got {shown(data_parallel)}")
    found = hooks.engine(tuners, model, candidate, data_parallel)
    if found is not None:
        return found
    if data_parallel or (data_parallel is None and _is_one_of_several()):
        raise StepError(
            "this process is one of a group, or has to be, and no installed plugin keeps the adapters of a group "
            f"alike, so each process would train its own in silence: {hooks.registry.absence(distribution(ENGINES))} "
            f"({install(ENGINES)}). If they are meant to be apart, attach with data_parallel=False"
        )
    return Alone(), candidate


def _is_one_of_several() -> bool:
    """Whether there is a process group, also of one process, around which there may be DDP; or a launcher says so."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    return grouped or os.environ.get("WORLD_SIZE", "1") not in ("", "1")
