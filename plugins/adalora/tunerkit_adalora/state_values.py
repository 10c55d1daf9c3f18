"""The numbers and flags of AdaLoRA's training state in a file, checked before they are used."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from tunerkit.errors import shown
from tunerkit.plugin import FileError
from tunerkit_adalora.phase import Phase

WHAT_FITS = "Load a state that was saved together with the adapter's weights; without one, the schedule restarts"
_LIMIT = 2**63  # counts are int64 on the device


@attrs.frozen
class SavedValues:
    """The values of a saved training state, without tensors, by their names in the file. Later versions may add more.

    Attributes:
        initial: b(0), in the config's unit.
        target: b(T), in the config's unit.
        last_step: The last step's number; 0 before the first.
        in_force: The budget of the last allocation.
        final: Whether the ranks are final.
        shrunk: Whether the ranks are final and no dead triplet is left in memory.
        blank: Whether no step has been averaged yet.
        anew: Whether the triplets were just rotated, so that the next gradients replace the averages.
        averaged: The number of steps averaged since the last allocation.
        seen: The number of gradients in these steps.
        left_out: The number of these gradients that were not finite.
    """

    initial: int
    target: int
    last_step: int
    in_force: int
    final: bool
    shrunk: bool
    blank: bool
    anew: bool
    averaged: int
    seen: int
    left_out: int

    @property
    def phase(self) -> Phase:
        """The phase that the flags describe. ``anew`` is ignored once the ranks are final."""
        if self.final:
            return Phase.FINAL_SHRUNK if self.shrunk else Phase.FINAL_MASKED
        if self.blank:
            return Phase.WAITING
        return Phase.RESTARTING if self.anew else Phase.AVERAGING


def flags_of(phase: Phase) -> dict[str, bool]:
    """Convert a phase to the file's flags.

    Args:
        phase: The phase.

    Returns:
        The flags by name; `SavedValues.phase` converts them back.
    """
    return {
        "final": phase.is_final,
        "shrunk": phase is Phase.FINAL_SHRUNK,
        "blank": phase is Phase.WAITING,
        "anew": phase is Phase.RESTARTING,
    }


def read_values(values: Mapping[str, object]) -> SavedValues:
    """Read the values of a file.

    Args:
        values: The file's values by name. Unknown names are ignored, since a later version may have added them.

    Returns:
        The values.

    Raises:
        FileError: Values are missing, of another type, out of range, or contradict others; the error lists all.
    """
    problems = [problem for field in attrs.fields(SavedValues) for problem in _misfit(field, values)]
    if not problems:
        known: dict[str, Any] = {field.name: values[field.name] for field in attrs.fields(SavedValues)}
        saved = SavedValues(**known)
        problems = list(_contradictions(saved))
        if not problems:
            return saved
    raise FileError(f"the training state cannot be restored: {'; '.join(problems)}. {WHAT_FITS}")


def _misfit(field: "attrs.Attribute[Any]", values: Mapping[str, object]) -> Iterator[str]:
    if field.name not in values:
        yield f"{field.name!r} is missing"
        return
    value, kind = values[field.name], field.type
    if type(value) is not kind:  # a bool is an int to Python, and not to us
        yield f"{field.name!r} is {shown(value)}, expected {'true or false' if kind is bool else 'an integer'}"
    elif isinstance(value, int) and not 0 <= value < _LIMIT:
        yield f"{field.name!r} is {shown(value)}, expected 0 or more and below 2**63"


def _contradictions(saved: SavedValues) -> Iterator[str]:
    if saved.target > saved.initial:
        yield f"'target' {saved.target} is above 'initial' {saved.initial}"
    if saved.in_force > saved.initial:
        yield f"'in_force' {saved.in_force} is above 'initial' {saved.initial}"
    if saved.left_out > saved.seen:
        yield f"'left_out' {saved.left_out} is above 'seen' {saved.seen}"
    if saved.averaged > saved.last_step:
        yield f"'averaged' {saved.averaged} is above 'last_step' {saved.last_step}"
    if saved.shrunk and not saved.final:
        yield "'shrunk' is true and 'final' is not"
    # With a Trainer whose steps were all skipped, `finish` makes the allocation final although nothing was averaged.
    if saved.blank and saved.last_step > 0 and not saved.final:
        yield "'blank' is true although steps were taken"
