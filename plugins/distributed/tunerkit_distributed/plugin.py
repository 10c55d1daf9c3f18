"""The hooks: which engine trains adapters, and how FSDP2 leaves each process a part of the base's weights."""

from collections.abc import Iterable, Sequence

from torch import nn

from tunerkit import Sharding, Tuner, hookimpl
from tunerkit.engine import Engine
from tunerkit_distributed.dtensors import gathered, is_split, local_part, reshard_
from tunerkit_distributed.engine_choice import engine_for


@hookimpl(trylast=True)  # it answers for every training: engines of others come first
def tunerkit_engine(
    tuners: Sequence[Tuner], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object]:
    """Find out in which kind of training this process is; alone too, since DDP may be around the model."""
    return engine_for(tuners, model, candidate, data_parallel)


@hookimpl
def tunerkit_shardings() -> Iterable[Sharding]:
    """Return how FSDP2 cuts weights."""
    return [Sharding(is_cut=is_split, part=local_part, gathered=gathered, reshard_=reshard_)]
