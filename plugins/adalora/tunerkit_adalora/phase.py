"""The phases of an AdaLoRA training."""

from enum import Enum


class Phase(Enum):
    """Where a training stands between attaching and the end.

    ::

        WAITING -> AVERAGING <-> RESTARTING        one allocation after another
                       |             |
                       v             v
                   FINAL_MASKED or FINAL_SHRUNK    from the final allocation on

    The first step leads from WAITING to AVERAGING. An allocation leads to RESTARTING if it rotated the triplets, and
    the next averaged step leads back. The final phases are never left.
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
