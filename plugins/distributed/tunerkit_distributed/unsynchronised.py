"""Rejects adapters that DistributedDataParallel would not synchronize, because it was built before them.

A module does not refer to the DDP that contains it, so `tunerkit.wrap` cannot detect this; DDP's next forward can.
"""

import re
from collections.abc import Collection
from typing import Any, Final

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit_distributed import torch_private

_ADAPTER: Final = re.compile(r"(?:^|\.)tunerkit\.([^.]+)\.")  # the adapter's name in a parameter's


def check_at_next_forward_(model: nn.Module, adapted: Collection[nn.Module]) -> None:
    """Register a check for when DDP next runs ``model`` or one of its adapted modules; it replaces earlier checks."""
    remove_check_(model)
    for module in (model, *adapted) if adapted else ():
        module.register_forward_pre_hook(refuse_unsynchronised)


def refuse_unsynchronised(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: raise `AdapterError` if the DDP that runs ``module`` does not know an adapter's parameter."""
    if torch_private.running_ddp() is not None:
        torch_private.uncompiled(_check)(module)


def _check(module: nn.Module) -> None:
    ddp = torch_private.running_ddp()
    known = set(map(id, torch_private.known_to(ddp))) if ddp is not None else set()
    named = module.named_parameters(remove_duplicate=False)
    unknown = {repr(found[1]) for name, p in named if id(p) not in known and (found := _ADAPTER.search(name))}
    if unknown:
        raise AdapterError(
            f"the model was already inside DistributedDataParallel when adapter {', '.join(sorted(unknown))} was put "
            "into it, so DDP would not synchronize the adapter; wrap the model first, then put it into DDP"
        )
    remove_check_(module)


def remove_check_(model: nn.Module) -> None:
    """Remove the check from all modules of ``model``."""
    for module in model.modules():
        torch_private.remove_hook_(module, refuse_unsynchronised)
