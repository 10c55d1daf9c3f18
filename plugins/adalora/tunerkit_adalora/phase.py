"""The phases of an AdaLoRA training."""

from enum import Enum


class Phase(Enum):
    """The phase of a training, from attaching to the end.

    ::

        WAITING -> AVERAGING <-> RESTARTING        one allocation after another
                       |             |
                       v             v
                   FINAL_MASKED or FINAL_SHRUNK    from the final allocation on

    The first step changes WAITING to AVERAGING. An allocation that rotates the triplets sets RESTARTING, and the next
    averaged step sets AVERAGING again. The final phases do not change.
    """

    WAITING = "no step yet: masks are as they were loaded"
    AVERAGING = "importance is averaged, allocations follow the schedule"
    RESTARTING = "triplets were just rotated: the next gradients replace the averages of the old ones"
    FINAL_MASKED = "ranks are final: after each step, λ of the dead triplets is set to 0"
    FINAL_SHRUNK = "ranks are final, and no dead triplet is left in memory"

    @property
    def is_final(self) -> bool:
        """Whether the final allocation has been made."""
        return self in FINAL


FINAL = (Phase.FINAL_MASKED, Phase.FINAL_SHRUNK)
