"""Count the gradients in the importance averages since the last allocation, and the unusable gradients."""

import attrs
from torch import Tensor

from tunerkit.errors import warn
from tunerkit.plugin import StepError


@attrs.define(eq=False)
class GradientCount:
    """Counts of gradients and steps since the last allocation.

    Attributes:
        left_out: The number of non-finite gradients; 0-d int64 on the device, so that the host need not wait.
        averaged: The number of steps whose gradients were averaged.
        seen: The number of gradients in these steps: one for each weight that had a gradient, and E for a stack of E
            matrices.
    """

    left_out: Tensor
    averaged: int = 0
    seen: int = 0

    def judge_(self, adapter: str, bad: int) -> None:
        """Warn of gradients that were left out.

        Args:
            adapter: The adapter's name, for the message.
            bad: The value of ``left_out``, read from the device.

        Raises:
            StepError: Steps were averaged, but no gradient in them was usable, so the scores are meaningless.
        """
        # No step is averaged between two allocations if they follow each other at T − t_f, or if all were skipped.
        if self.averaged and self.seen == bad:
            raise StepError(
                f"adapter {adapter!r} had no usable gradient in the {self.averaged} steps since the last allocation, "
                f"so its scores are meaningless; {_advice(bad)}"
            )
        if bad:
            self.left_out.zero_()
            warn(
                f"adapter {adapter!r}: {bad} of {self.seen} gradients were not finite since the last allocation and "
                "were left out of the importance averages"
            )


def _advice(bad: int) -> str:
    if bad:
        return f"all {bad} were NaN or infinite: lower the learning rate or check the loss"
    return (
        "check that the loss depends on it (reentrant checkpointing of a frozen base cuts it off: set "
        "use_reentrant=False)"
    )
