"""Whether adapters are merged or disabled now, and what is refused then."""

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection.slots import walk


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are merged into ``model`` now."""
    return any(slots.merged for _, _, slots in walk(model))


def refuse_disabled(model: nn.Module) -> None:
    """Inside a ``with disabled(model)`` block the base stands in place of what merging and wrapping would change."""
    if any(not slots.enabled for _, _, slots in walk(model)):
        raise AdapterError("the model's adapters are disabled; leave the block of tunerkit.disabled first")


def refuse_merged(model: nn.Module, what: str) -> None:
    """While merged, forward is that of the merged weights: ``what`` would change nothing that is seen."""
    if is_merged(model):
        raise AdapterError(f"the model is merged; call tunerkit.unmerge before {what}")
