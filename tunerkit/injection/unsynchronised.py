"""Refuses adapters that DistributedDataParallel would not synchronise: it was built before they were put in.

A module does not know what holds it, so wrapping a part of a DDP cannot see this. DDP's next forward can.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection.slots import walk
from tunerkit.libraries import torch_private


def check_at_next_forward_(modules: Iterable[nn.Module]) -> None:
    """Check the adapters in ``modules`` when DDP first runs one; without a process group there is no DDP."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for module in modules:
            module.register_forward_pre_hook(refuse_unsynchronised)


def forget_check_(model: nn.Module) -> None:
    """Undo `check_at_next_forward_` in ``model``."""
    for module in model.modules():
        torch_private.remove_hooks_(module, refuse_unsynchronised)


def refuse_unsynchronised(module: nn.Module, args: Any) -> None:
    """The forward pre-hook: raise `AdapterError` if the DDP that runs ``module`` lacks a parameter of its adapters."""
    if torch_private.running_ddp() is not None:
        torch_private.uncompiled(_check)(module)


def _check(module: nn.Module) -> None:
    ddp = torch_private.running_ddp()
    known = set(map(id, torch_private.synchronised(ddp))) if ddp is not None else set()
    added = [(name, slot) for _, _, slots in walk(module) for name, slot in slots.named_children()]
    unknown = {repr(name) for name, slot in added if not known.issuperset(map(id, slot.parameters()))}
    if unknown:
        raise AdapterError(
            f"the model was already inside DistributedDataParallel when adapter {', '.join(sorted(unknown))} was put "
            "into it, which would be trained without synchronisation; wrap it first, then put it into DDP"
        )
    forget_check_(module)
