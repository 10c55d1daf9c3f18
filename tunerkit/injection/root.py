"""Sees through the modules that run a model as it is: compiled ones and DataParallel."""

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.libraries import torch_private


def expect_module(model: object) -> nn.Module:
    """``model``, or `AdapterError` if it is none."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    return model


def inside(model: object) -> nn.Module:
    """The model that `torch.compile` or ``nn.DataParallel`` was given: paths must not depend on what runs it.

    Raises `AdapterError` for what is no module.
    """
    found = expect_module(model)
    while (inner := _inner(found)) is not None:
        found = inner
    return found


def _inner(model: nn.Module) -> nn.Module | None:
    return model.module if isinstance(model, nn.DataParallel) else torch_private.compiled_from(model)
