"""Gather parameters that DeepSpeed has partitioned, in `deepspeed.zero.Init` or later; build unpartitioned modules.

Nothing here imports DeepSpeed unless a parameter shows that it is in use.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_STATUS, _WHOLE = "ds_status", "AVAILABLE"  # otherwise this rank has a shard, and the parameter is empty
_INIT = "deepspeed.runtime.zero.partition_parameters"


def is_zero_shard(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned a parameter, even while it is gathered."""
    return "ds_id" in vars(parameter)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return a parameter's full shape, which DeepSpeed stores separately, since it empties the parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(module: nn.Module) -> Iterator[Callable[[str, Tensor], Tensor]]:
    """Inside the block, the parameters of a module are gathered, for reading. All ranks must enter it."""
    away = [parameter for parameter in module.parameters() if _is_partitioned(parameter)]
    if not away:
        yield _whole
        return
    deepspeed: Any = importlib.import_module("deepspeed")  # imported already: it has partitioned them
    with deepspeed.zero.GatheredParameters(away):
        yield _whole


def _is_partitioned(parameter: Tensor) -> bool:
    """Whether a parameter is empty now, because ZeRO-3 has partitioned it and not gathered it."""
    status = getattr(parameter, _STATUS, None)
    return status is not None and getattr(status, "name", status) != _WHOLE


def _whole(name: str, tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Inside the block, new modules are not partitioned, even if the caller is in `deepspeed.zero.Init`."""
    module: Any = sys.modules.get(_INIT)
    if module is None:
        yield
        return
    module.shutdown_init_context()
    try:
        yield
    finally:
        module.restore_init_context()
