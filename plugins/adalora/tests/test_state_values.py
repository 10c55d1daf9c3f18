"""The values of a training state in a file: each is checked, and their flags name a phase."""

import itertools
from typing import Any

import pytest

from tunerkit.errors import FileError
from tunerkit_adalora.phase import Phase
from tunerkit_adalora.state_values import SavedValues, flags_of, read_values

# After 7 steps, one since an allocation.
GOOD: dict[str, Any] = {
    "initial": 12, "target": 6, "last_step": 7, "in_force": 9, "averaged": 1, "seen": 9, "left_out": 0,
    "final": False, "shrunk": False, "blank": False, "anew": False,
}  # fmt: skip
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "no number": ({"last_step": "5"}, "'last_step' is '5', expected an integer"),
    "a fraction": ({"seen": 9.0}, "'seen' is 9.0, expected an integer"),
    "a flag for a number": ({"seen": True}, "'seen' is True, expected an integer"),
    "a number for a flag": ({"final": 0}, "'final' is 0, expected true or false"),
    "null": ({"anew": None}, "'anew' is None, expected true or false"),
    "negative": ({"in_force": -1}, "'in_force' is -1, expected 0 or more and below 2**63"),
    "too large": ({"seen": 2**63}, "'seen' is 9223372036854775808, expected 0 or more and below 2**63"),
    "a budget that rises": ({"target": 13}, "'target' 13 is above 'initial' 12"),
    "more in force than ever": ({"in_force": 13}, "'in_force' 13 is above 'initial' 12"),
    "more left out than seen": ({"left_out": 10}, "'left_out' 10 is above 'seen' 9"),
    "more averaged than taken": ({"averaged": 8}, "'averaged' 8 is above 'last_step' 7"),
    "shrunk too early": ({"shrunk": True}, "'shrunk' is true and 'final' is not"),
    "blank after steps": ({"blank": True}, "'blank' is true although steps were taken"),
    "several": ({"target": 13, "left_out": 10}, "'target' 13 is above 'initial' 12; 'left_out' 10 is above 'seen' 9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str) -> None:
    """The error has every problem, and what to load instead."""
    changes, words = WRONG[name]
    with pytest.raises(FileError) as caught:
        read_values({**GOOD, **changes})
    assert f"cannot be restored: {words}. Load a state that was saved together with" in str(caught.value)


def test_all_values_that_are_missing_are_named() -> None:
    """One error for all of them."""
    with pytest.raises(
        FileError, match="; ".join(f"'{name}' is missing" for name in ("initial", "target", "last_step"))
    ):
        read_values({})


@pytest.mark.parametrize(
    "changes",
    [
        {"seen": 2**63 - 1},
        {"target": 12, "in_force": 12, "left_out": 9, "averaged": 7},
        {"last_step": 0, "averaged": 0, "blank": True},
        {"final": True, "blank": True},  # a Trainer whose steps were all skipped
    ],
    ids=["the largest", "at their limits", "no step yet", "no step counted"],
)
def test_values_that_can_be_are_read_and_later_ones_ignored(changes: dict[str, object]) -> None:
    """A later version may add values."""
    given = {**GOOD, **changes}
    assert read_values({**given, "later": [1, 2]}) == SavedValues(**given)


@pytest.mark.parametrize("each", Phase)
def test_the_flags_of_a_file_name_each_phase(each: Phase) -> None:
    """Phases survive the round trip through flags."""
    assert SavedValues(**{**GOOD, **flags_of(each)}).phase is each
    assert each.is_final == flags_of(each)["final"]


def test_every_combination_of_flags_has_one_phase() -> None:
    """Older files could have `anew` together with `final`; the final phases win."""
    for final, shrunk, blank, anew in itertools.product([False, True], repeat=4):
        found = SavedValues(**{**GOOD, "final": final, "shrunk": shrunk, "blank": blank, "anew": anew}).phase
        assert found.is_final == final
        assert (found is Phase.FINAL_SHRUNK) == (final and shrunk)
