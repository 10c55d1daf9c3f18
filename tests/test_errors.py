"""Error texts: whatever a file, a model or a plugin holds, a message is short and its end says what to do."""

import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, strategies as st
from torch import nn

import tunerkit
from tunerkit.errors import (
    LINES,
    WIDTH,
    ConfigError,
    TargetError,
    TunerkitError,
    TunerkitWarning,
    bounded,
    closest,
    cut,
    shown,
)
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import ShiftPlugin

BIG = "x" * 1_000_000
KINDS = [TunerkitError, TargetError, tunerkit.errors.PluginError, tunerkit.errors.FileError, TunerkitWarning]


@given(st.text(max_size=300), st.integers(60, 200))
def test_a_cut_text_keeps_its_start_and_its_end(text: str, width: int) -> None:
    """Law: a short text is unchanged; a long one keeps its first and last characters and has exactly the width."""
    found = cut(text, width)
    if len(text) <= width:
        assert found == text
    else:
        assert len(found) == width
        assert found.startswith(text[:15])
        assert found.endswith(text[-5:])


@given(st.lists(st.text(max_size=30), max_size=2 * LINES))
def test_a_bounded_text_has_few_lines_and_counts_the_others(lines: list[str]) -> None:
    """Law: the first lines are unchanged, and one more line says how many there were."""
    text = "\n".join(line.replace("\n", " ") for line in lines)
    found = bounded(text).split("\n")
    assert len(found) <= LINES
    if text.count("\n") < LINES:
        assert bounded(text) == text
    else:
        assert found[: LINES - 1] == text.split("\n")[: LINES - 1]
        assert found[-1] == f"... {text.count(chr(10)) + 2 - LINES} more lines"


@pytest.mark.parametrize("kind", KINDS)
def test_no_error_and_no_warning_is_longer_than_its_bound(kind: type[Exception]) -> None:
    """Law: the class itself cuts its text, so that no caller can forget it; the advice at the end stays."""
    text = str(kind("start " + BIG + " end; do this"))
    assert len(text) == WIDTH
    assert text.endswith("end; do this")
    assert len(str(kind("\n".join([BIG[:5000]] * 1000)))) <= LINES * (WIDTH + 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.warn(BIG, TunerkitWarning, stacklevel=1)
    assert len(str(told[0].message)) == WIDTH


def test_a_config_error_shows_twenty_problems_and_has_them_all() -> None:
    """``problems`` is complete, each line bounded; copies by pickle are equal."""
    error = ConfigError([f"{number} {BIG[:5000]}" for number in range(1000)])
    assert len(error.problems) == 1000
    assert max(map(len, error.problems)) == WIDTH
    assert str(error).split("\n")[20:] == ["and 980 more problems"]
    assert pickle.loads(pickle.dumps(error)).problems == error.problems  # our own object


class Unprintable:
    """Its repr raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __repr__(self) -> str:
        raise self.error


@pytest.mark.parametrize(
    "value",
    [
        *(BIG, BIG.encode(), [BIG] * 1000, {BIG: [BIG] * 9}, 10**5000, -(10**5000), [10**5000]),
        *(Unprintable(ValueError()), Unprintable(SystemExit()), [Unprintable(SystemExit())], nn.Linear(2, 2), "a\nb"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_in_one_short_line(value: Any) -> None:
    """Law: also what is huge, nested, or raises when it is printed."""
    text = shown(value)
    assert 0 < len(text) <= 200
    assert "\n" not in text


def test_short_values_are_shown_as_they_are() -> None:
    """Law: an ordinary value reads as in Python."""
    for value in (None, 3, 2.5, "q_proj", ["a", 1], {"a": [1]}, ("x",)):
        assert shown(value) == repr(value)


def test_no_hint_is_searched_for_a_huge_name() -> None:
    """Comparing a million characters with other names takes seconds."""
    assert closest(BIG, ["x"]) == ""
    assert closest("adalor", ["adalora"]) == "; did you mean 'adalora'?"


NAMES = tuple(f"q_proj{number}" for number in range(1000))
HUGE: dict[str, dict[str, Any]] = {
    "targets": {"targets": NAMES},
    "exclude": {"targets": "all-linear", "exclude": NAMES},
    "train_modules": {"targets": "all-linear", "train_modules": NAMES},
    "layers": {"targets": "all-linear", "layers": tuple(range(100_000))},
    "what cannot be adapted": {"targets": [f"layer{number}.1" for number in range(200)]},
    "unknown keys": {f"targts{number}": 1 for number in range(20_000)},
    "a huge key": {BIG: 1},
    "a huge name": {"targets": BIG},
    "a huge choice": {"bias": BIG},
    "wrong elements": {"targets": [1] * 10_000},
}


@pytest.mark.parametrize("case", HUGE)
def test_wrapping_with_huge_settings_fails_with_a_short_error(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the text is bounded, and the closest names are looked for only in the first errors of many."""
    searched: list[str] = []

    def counted(name: str, names: Iterable[str]) -> str:
        searched.append(name)
        return closest(name, names)

    monkeypatch.setattr("tunerkit.targets.selection.closest", counted)
    model = nn.ModuleDict({f"layer{number}": nn.Sequential(nn.Linear(1, 1), nn.ReLU()) for number in range(200)})
    with registered(ShiftPlugin()), pytest.raises((ConfigError, TargetError)) as caught:
        tunerkit.wrap(model, "toy-shift", HUGE[case])
    assert len(str(caught.value)) < 10_000
    assert str(caught.value).count("\n") < LINES
    assert len(searched) <= 8


def toy(name: str = "b") -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(1, 1), name: nn.ReLU()})


MISUSES: dict[str, Callable[[], object]] = {
    "method": lambda: tunerkit.wrap(toy(), BIG),
    "adapter": lambda: tunerkit.wrap(toy(), "toy-shift", adapter=BIG),
    "seed": lambda: tunerkit.wrap(toy(), "toy-shift", seed=BIG),  # type: ignore[arg-type]
    "tuner": lambda: tunerkit.tuner(tunerkit.wrap(toy(), "toy-shift"), BIG),
    "module": lambda: tunerkit.wrap(toy(BIG), "toy-shift", {"targets": ["other"]}),
}


@pytest.mark.parametrize("what", MISUSES)
def test_other_huge_arguments_fail_with_a_short_error(what: str) -> None:
    """Law: names of methods, adapters and modules are bounded in every message."""
    with registered(ShiftPlugin()), pytest.raises(TunerkitError) as caught:
        MISUSES[what]()
    assert len(str(caught.value)) <= 2 * WIDTH
