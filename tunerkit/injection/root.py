"""Finds the model inside modules that run it unchanged: compiled ones and DataParallel."""

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.libraries import torch_private


def inside(model: object) -> nn.Module:
    """Return the model that `torch.compile` or ``nn.DataParallel`` was given: paths must not depend on the wrapper.

    Raises:
        AdapterError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    inner = model.module if isinstance(model, nn.DataParallel) else torch_private.compiled_from(model)
    return model if inner is None else inside(inner)
