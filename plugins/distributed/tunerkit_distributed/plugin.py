"""The hooks: the engine of a training, how libraries offload or shard weights, and which operations do not work."""

import os
from collections.abc import Iterable, Sequence

from torch import distributed, nn

from tunerkit.plugin import Engine, Holding, Restriction, Tuner, hookimpl
from tunerkit_distributed.choice import engine_for
from tunerkit_distributed.holdings import HOLDINGS, RESTRICTIONS
from tunerkit_distributed.unsynchronised import check_at_next_forward_, remove_check_


def _in_group() -> bool:
    """Whether there is a process group. One of a single process counts too, since DDP may wrap the model there."""
    return distributed.is_available() and distributed.is_initialized()


@hookimpl(trylast=True)  # it answers for every training: engines of others come first
def tunerkit_engine(
    tuners: Sequence[Tuner], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object] | None:
    """Choose an engine, unless this process is alone."""
    launched = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    if not (data_parallel or launched or _in_group()):
        return None
    return engine_for(tuners, model, candidate, data_parallel)


@hookimpl
def tunerkit_holdings() -> Iterable[Holding]:
    """Return how accelerate offloads weights, and how DeepSpeed and FSDP2 shard them."""
    return HOLDINGS


@hookimpl
def tunerkit_restrictions() -> Iterable[Restriction]:
    """Return the operations that are rejected with FSDP and DeepSpeed."""
    return RESTRICTIONS


@hookimpl
def tunerkit_adapted(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Register a check, at the next forward inside DDP, that DDP synchronizes the adapters."""
    if _in_group():
        check_at_next_forward_(model, modules)


@hookimpl
def tunerkit_unwrapped(model: nn.Module) -> None:
    """Remove the check of `tunerkit_adapted`, also from copies."""
    remove_check_(model)
