"""Attributes of base layers that must have other values while adapters are in: set, and put back with the last one."""

from torch import nn

from tunerkit.injection.tuner import Wrapped
from tunerkit.targets import Scan


def hold_settings_(wrapped: Wrapped, scanned: Scan) -> None:
    """Set what each kind asks for, see `BaseLayer.while_adapted`, on every module of the model."""
    for found in (scanned.root, *scanned.modules):
        for name, value in (found.base.while_adapted if found.base is not None else {}).items():
            if not any(module is found.module and held == name for module, held, _ in wrapped.held):
                wrapped.held.append((found.module, name, getattr(found.module, name)))
                setattr(found.module, name, value)


def release_settings_(wrapped: Wrapped) -> None:
    """Put the earlier values back."""
    module: nn.Module
    for module, name, value in wrapped.held:
        setattr(module, name, value)
    wrapped.held.clear()
