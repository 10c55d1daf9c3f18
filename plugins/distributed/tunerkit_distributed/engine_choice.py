"""What the processes of a training do together, found out from the optimizer that trains it."""

from collections.abc import Sequence

from torch import nn

from tunerkit import injection, layers
from tunerkit.errors import StepError
from tunerkit.hooks import Engine
from tunerkit.injection import Tuner
from tunerkit.paths import few
from tunerkit_distributed import choice
from tunerkit_distributed.deepspeed_names import DEEPSPEED
from tunerkit_distributed.holdings import is_sharded


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
    if any(layers.is_named(type(candidate), kind) for kind in DEEPSPEED):
        from tunerkit_distributed import zero  # few trainings need it

        engine = zero.engine_of(candidate)
        if engine is not None:
            _refuse_overrides(tuners)
            return engine, engine.optimizer
    parameters = (parameter for tuner in tuners for parameter in tuner.parameters())
    return choice.engine_for(model, parameters, data_parallel), candidate


def _refuse_overrides(tuners: Sequence[Tuner]) -> None:
    """Raise `StepError` if a forward must override a weight that ZeRO-3 has emptied by then."""
    read = [
        path
        for path, module, slots in injection.walk(tuners[0].model)
        if slots.base is not None
        and not injection.is_called(module)
        and any(slot.adapter is not None for slot in slots.applied)  # a trained bias needs no weight
        and _is_sharded(module, slots.base.weight_name)
    ]
    if read:
        raise StepError(
            f"{few(read, shown=5)} is used directly by its owner, bypassing its own forward(), so its delta must be "
            "added to a weight that ZeRO-3 has partitioned: exclude it from the targets, or use ZeRO-2"
        )


def _is_sharded(module: nn.Module, name: str) -> bool:
    weight = layers.torch_private.own_parameters(module).get(name)
    return weight is not None and is_sharded(weight)
