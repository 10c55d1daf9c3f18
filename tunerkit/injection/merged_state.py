"""Whether adapters are merged or disabled, and what is rejected meanwhile."""

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection.slots import walk


def is_merged(model: nn.Module) -> bool:
    """Return whether adapters are merged into ``model`` now."""
    return any(slots.merged for _, _, slots in walk(model))


def refuse_disabled(model: nn.Module) -> None:
    """Raise `AdapterError` inside ``with disabled(model)``, where the base replaces what a caller would change."""
    if any(not slots.enabled for _, _, slots in walk(model)):
        raise AdapterError("the model's adapters are disabled; leave the block of tunerkit.disabled first")


def refuse_fixed(model: nn.Module, what: str) -> None:
    """Raise `AdapterError` if ``model`` is disabled or merged: then ``what`` would not change the output."""
    refuse_disabled(model)
    if is_merged(model):
        raise AdapterError(f"the model is merged; call tunerkit.unmerge before {what}")
