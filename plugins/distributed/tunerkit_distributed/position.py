"""A rank's position in the training, encoded as numbers that one all-reduce compares."""

from collections.abc import Sequence
from typing import Any, Final

import attrs

from tunerkit.errors import StepError
from tunerkit_distributed import group

_ROUND: Final = 16  # numbers are compared modulo this: fp32 holds their squares exactly, summed over 74,000 ranks


@attrs.frozen
class Position:
    """A point of the training.

    Attributes:
        step: The number of steps taken.
        part: A number that encodes the forwards and backwards since the last step.
        stepping: Whether the rank is about to step; otherwise it is in a forward or a backward.
        training: The training's number, since a process group may run several with adapters of the same names.
        adapters: The names of the trained adapters.
        doing: The current operation, for messages.
    """

    step: int
    part: int
    stepping: bool
    training: int
    adapters: Sequence[str]
    doing: str

    def numbers(self) -> list[float]:
        """Return 7 numbers to sum over all ranks: ``stepping``, and three numbers, each with its square.

        The three are the step, the part, and one for the training and its adapters.
        """
        whose = 5 * self.training + len(self.adapters)  # an adapter may be deleted on one rank alone
        rounded = [number % _ROUND for number in (self.step, self.part, whose)]
        return [float(self.stepping), *(float(each) for number in rounded for each in (number, number * number))]

    def refuse_mismatch(self, sums: Sequence[float], within: Any = None) -> None:
        """Raise `StepError` on every rank if the ranks' positions differ.

        A number is equal on all ranks if and only if its mean square equals its squared mean.

        Args:
            sums: `numbers`, summed over all ranks.
            within: The process group that gathers the ranks' descriptions; None for the default one.
        """
        processes = group.processes()
        stepping, *rest = sums
        pairs = zip(rest[::2], rest[1::2], strict=True)
        if stepping in (0, processes) and all(squared * processes == total * total for total, squared in pairs):
            return
        own = f"step {self.step + 1}, {self.doing} (adapters: {', '.join(self.adapters)})"
        described = group.gather_text(f"{self.training} {own}", "the places of the processes", within)
        trainings, positions = zip(*(text.split(" ", 1) for text in described), strict=True)
        which = [f" of training {each}" for each in trainings] if len(set(trainings)) > 1 else [""] * len(trainings)
        everybody = map("".join, zip(positions, which, strict=True))
        listed = "; ".join(f"process {number} is at {position}" for number, position in enumerate(everybody))
        raise StepError(
            f"the processes are not at the same point of the training: {listed}. Every process must take every step, "
            "with the same number of backwards in each. Where data runs out unevenly, drop the last batches"
        )
