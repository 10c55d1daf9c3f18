"""The attributes in which a module holds a packed weight: they are replaced as a whole, not value by value."""

import copy
from typing import Any

from torch import nn

from tunerkit.injection import slots_of
from tunerkit.layers import BaseLayer


def is_whole(module: nn.Module, name: str) -> bool:
    """Whether a merge replaces the attribute ``name`` of ``module`` itself: all of a packed weight is, no bias is."""
    slots = slots_of(module)
    base = None if slots is None else slots.base
    return base is not None and base.packing is not None and name != base.bias_name


def put_(module: nn.Module, name: str, value: Any) -> None:
    """Replace an attribute. What was kept while the model moved to another device or dtype is moved there now."""
    before = _device_of(module)
    setattr(module, name, _cast(value, getattr(module, name, None)))
    if (device := _device_of(module)) is not None and before is not None and device != before:
        module.to(before)


def _cast(kept: Any, live: Any) -> Any:
    """``kept`` in the dtype of ``live``, where both are packed weights that have one, as torchao's of few bits do."""
    if not (isinstance(kept, nn.Parameter) and isinstance(live, nn.Parameter)) or kept.dtype == live.dtype:
        return kept
    if not (kept.is_floating_point() and live.is_floating_point()):
        return kept
    return nn.Parameter(kept.detach().to(live.dtype), requires_grad=kept.requires_grad)


def _device_of(module: nn.Module) -> Any:
    return next((parameter.device for parameter in module.parameters(recurse=False)), None)


def twin_of(base: BaseLayer, attributes: dict[str, Any]) -> BaseLayer:
    """Return a base layer like ``base`` with other attributes. The two share everything else; neither is changed."""
    module = copy.copy(base.module)
    # A shallow copy shares the dicts that hold parameters and buffers.
    vars(module).update({name: dict(own) for name, own in vars(module).items() if type(own) is dict})
    for name, value in attributes.items():
        setattr(module, name, value)
    return type(base)(module)
