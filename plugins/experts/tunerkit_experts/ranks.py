"""The live ranks of each expert."""

from torch import Tensor

from tunerkit.plugin import Tuner
from tunerkit_experts.stacks import Stack


def ranks(tuner: Tuner) -> dict[str, list[int]]:
    """Return the live rank of each expert, by the path of its stack.

    Args:
        tuner: The handle on an adapter, from `tunerkit.tuner`.

    Returns:
        One list for each stack, with one number for each expert; empty if no stack is adapted. For AdaLoRA, the numbers
        of all stacks and the ranks of the other layers sum to ``tuner.budget()``.
    """
    found = {}
    for target in tuner.targets:
        if isinstance(target.module, Stack):
            adapter = tuner.adapters()[target.path]
            mask = getattr(adapter, "mask", None)
            found[target.path] = (
                mask.sum(dim=-1).tolist() if isinstance(mask, Tensor) else [adapter.rank] * target.module.count
            )
    return found
