"""What the processes of a training do together, found out from the optimizer that trains it."""

from collections.abc import Sequence

from torch import nn

from tunerkit import libraries, parallel
from tunerkit.injection import Tuner
from tunerkit.parallel import Engine


def engine_for(
    tuners: Sequence[Tuner], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object]:
    """Find out what the processes do together, and what takes the step hooks.

    Args:
        tuners: The adapters that are trained.
        model: The model that runs, which may be around the wrapped one.
        candidate: The optimizer, or what DeepSpeed has instead.
        data_parallel: What `tunerkit.attach` was given.

    Returns:
        The engine; and ``candidate``, or where DeepSpeed trains the optimizer that stands for its own.
    """
    if any(libraries.derives_from(candidate, kind) for kind in libraries.DEEPSPEED):
        from tunerkit.integrations import deepspeed  # few trainings need it

        zero = deepspeed.engine_of(candidate)
        if zero is not None:
            return zero, zero.optimizer
    parameters = (parameter for tuner in tuners for parameter in tuner.parameters())
    return parallel.engine_for(model, parameters, data_parallel), candidate
