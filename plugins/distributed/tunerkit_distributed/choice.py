"""Find out in which kind of training a process is."""

from collections.abc import Iterable

from torch import nn

from tunerkit.errors import StepError, warn
from tunerkit.hooks import Engine
from tunerkit_distributed import group
from tunerkit_distributed.deepspeed_names import is_of_deepspeed
from tunerkit_distributed.dtensors import is_split, reshard_
from tunerkit_distributed.replicated import OF_DEEPSPEED, Apart, Replicated
from tunerkit_distributed.sharded import Sharded
from tunerkit_distributed.single import Single

_UNJOINED = (
    "WORLD_SIZE says that this process is one of several, and it is in no process group: each trains an adapter of its "
    "own, and may overwrite the files of the others. Call torch.distributed.init_process_group before attach; a "
    "Trainer on CPUs does with use_cpu=True. If they are meant to be apart, attach with data_parallel=False"
)


def engine_for(model: nn.Module, parameters: Iterable[nn.Parameter], data_parallel: bool | None) -> Engine:
    """Return a new engine for adapters with these parameters.

    It warns if a launcher started several processes that have formed no group.

    Args:
        model: The model that runs, in which FSDP2 may have sharded the wrapped one.
        parameters: The adapters' parameters.
        data_parallel: False for a process that trains adapters of its own; None to find out; True if there must be a
            process group.

    Raises:
        StepError: ``data_parallel`` is True in one process.
    """
    if data_parallel and not group.in_group():
        raise StepError(
            "data_parallel=True, and this process is in no group of several: call torch.distributed.init_process_group "
            "before attach, and start the processes with torchrun"
        )
    if data_parallel is False:
        return Apart() if group.in_group() else Single()
    reshard_(model)
    parameters = list(parameters)
    if any(is_of_deepspeed(parameter) for parameter in parameters):
        raise StepError(OF_DEEPSPEED)
    if any(is_split(parameter) for parameter in parameters):
        return Sharded(model)
    if not group.in_group():
        if group.is_launched():
            warn(_UNJOINED)
        return Single()
    return Replicated()
