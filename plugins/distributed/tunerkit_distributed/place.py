"""Where a process is in the training, as numbers that one all-reduce compares."""

from collections.abc import Sequence
from typing import Any, Final

import attrs

from tunerkit.errors import StepError
from tunerkit_distributed import group

_ROUND: Final = 16  # numbers are compared modulo this: fp32 holds their squares exactly, summed over 74,000 processes


@attrs.frozen
class Place:
    """A point of the training.

    Attributes:
        step: The steps taken.
        part: What happened since the last step, as a number that differs if something else happened.
        stepping: Whether the process is about to step, and not at a backward.
        training: The number of the training: a process group may have several, of adapters with the same names.
        adapters: The names of the adapters that are trained.
        doing: What the process does there, for messages.
    """

    step: int
    part: int
    stepping: bool
    training: int
    adapters: Sequence[str]
    doing: str

    def numbers(self) -> list[float]:
        """What is summed over all processes, 7 numbers: the flag, and each other number with its square."""
        whose = 5 * self.training + len(self.adapters)  # an adapter may be deleted in one process
        rounded = [number % _ROUND for number in (self.step, self.part, whose)]
        return [float(self.stepping), *(float(each) for number in rounded for each in (number, number * number))]

    def refuse_apart(self, sums: Sequence[float], within: Any = None) -> None:
        """Raise `StepError`, in every process, if they are not at one place.

        Numbers are equal in all processes if their squares' mean is the square of their mean.

        Args:
            sums: The sums over all processes of `numbers`.
            within: The process group that tells where each process is; None for the default one.
        """
        processes = group.processes()
        stepping, *rest = sums
        pairs = zip(rest[::2], rest[1::2], strict=True)
        if stepping in (0, processes) and all(squared * processes == total * total for total, squared in pairs):
            return
        own = f"step {self.step + 1}, {self.doing} (adapters: {', '.join(self.adapters)})"
        told = group.gather_text(f"{self.training} {own}", "the places of the processes", within)
        trainings, places = zip(*(text.split(" ", 1) for text in told), strict=True)
        which = [f" of training {each}" for each in trainings] if len(set(trainings)) > 1 else [""] * len(trainings)
        everybody = map("".join, zip(places, which, strict=True))
        listed = "; ".join(f"process {number} is at {place}" for number, place in enumerate(everybody))
        raise StepError(
            f"the processes are not at the same point of the training: {listed}. Every process must take every step, "
            "with the same number of backwards in each. Where data runs out unevenly, drop the last batches"
        )
