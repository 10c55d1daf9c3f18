"""Choose the engine of a training: how its ranks synchronize their adapters."""

from collections.abc import Sequence

from torch import nn

import tunerkit
from tunerkit.errors import StepError, warn
from tunerkit.plugin import Engine, Tuner
from tunerkit.plugin.engines import is_called, is_named
from tunerkit_distributed import group
from tunerkit_distributed.averaging import OF_DEEPSPEED, Replicated, few
from tunerkit_distributed.deepspeed_names import DEEPSPEED, is_of_deepspeed
from tunerkit_distributed.dtensors import is_split, reshard_
from tunerkit_distributed.holdings import is_sharded
from tunerkit_distributed.sharded import Sharded
from tunerkit_distributed.single import Apart, Single

_UNJOINED = (
    "WORLD_SIZE says that this process is one of several, but it is in no process group: each process trains its own "
    "adapter, and may overwrite the files of the others. Call torch.distributed.init_process_group before attach; a "
    "Trainer on CPUs does this with use_cpu=True. To train independent adapters, attach with data_parallel=False"
)


def engine_for(
    tuners: Sequence[Tuner], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object]:
    """Choose the engine, and the optimizer for the step hooks.

    Warns if a launcher started several processes and there is no process group.

    Args:
        tuners: The adapters to train.
        model: The model that runs; it may contain the wrapped model, sharded by FSDP2.
        candidate: The optimizer, or DeepSpeed's engine or optimizer.
        data_parallel: False if each rank trains adapters of its own; None to detect it; True to require a process
            group.

    Returns:
        A new engine; and ``candidate``, or a torch optimizer around DeepSpeed's.

    Raises:
        StepError: ``data_parallel`` is True and there is no process group, or DeepSpeed's way of training is not
            supported.
    """
    if any(is_named(type(candidate), kind) for kind in DEEPSPEED):
        from tunerkit_distributed import zero  # few trainings need it

        engine = zero.engine_of(candidate)
        if engine is not None:
            _refuse_overrides(tuners[0].model)
            return engine, engine.optimizer
    if data_parallel and not group.is_formed():
        raise StepError(
            "data_parallel=True, and this process is in no process group: call torch.distributed.init_process_group "
            "before attach, and start the processes with torchrun"
        )
    if data_parallel is False:
        return (Apart() if group.in_group() else Single()), candidate
    reshard_(model)
    parameters = [parameter for tuner in tuners for parameter in tuner.parameters()]
    if any(map(is_of_deepspeed, parameters)):
        raise StepError(OF_DEEPSPEED)
    if any(map(is_split, parameters)):
        return Sharded(model), candidate
    if group.in_group():
        return Replicated(expected=data_parallel is True), candidate
    if group.is_launched():
        warn(_UNJOINED)
    return Single(), candidate


def _refuse_overrides(model: nn.Module) -> None:
    """Raise `StepError` if an adapted weight must be overridden in forwards, and ZeRO-3 has partitioned it."""
    active, tuners = tunerkit.active(model), tunerkit.adapters(model)
    targets = {target.path: target.module for name in active for target in tuners[name].targets}
    read = [
        path
        for path, module in targets.items()
        if not is_called(module) and any(map(is_sharded, module.parameters(recurse=False)))
    ]
    if read:
        raise StepError(
            f"{few(read, shown=5)} is used directly by its owner, bypassing its own forward(), so its delta must be "
            "added to a weight that ZeRO-3 has partitioned: exclude it from the targets, or use ZeRO-2"
        )
