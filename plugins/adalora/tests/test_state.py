"""AdaLoRA's training state: saved and restored at any step, under the names that files have."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit
from plugins.adalora.tests.short_training import (
    TOTAL,
    attached,
    everything,
    live,
    masked_lambdas,
    resumed,
    same,
    trained,
    wrapped,
)
from tunerkit import injection
from tunerkit.plugin import State
from tunerkit_adalora.state import restore
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import step, train


@pytest.mark.filterwarnings("ignore:.*above the final")
@pytest.mark.parametrize(
    "changes", [{"gamma": 0.1}, {"exact_svd": True}, {"shrink": True}], ids=["regulariser", "SVD form", "shrunk"]
)
@pytest.mark.parametrize("at", [1, 5, 6, 7, 8, 13, 14, 15, TOTAL - 1])
def test_a_run_split_at_any_step_continues_bit_identically(at: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Split before, at, between or after allocations, the resumed run has all that the whole one has, at each step."""
    whole = wrapped(**changes)
    optimizer = attached(whole)
    train(whole, optimizer, at)
    part, again = resumed(whole, optimizer, tmp_path)
    for _ in range(at, TOTAL):
        assert same(everything(part), everything(whole))
        assert step(part, again) == step(whole, optimizer)
    assert same(everything(part), everything(whole))
    moments, others = (each.state_dict()["state"] for each in (again, optimizer))
    assert moments.keys() == others.keys()
    assert all(torch.equal(moments[at][name], others[at][name]) for at in moments for name in moments[at])
    assert live(part) == 6


def test_gradients_left_out_before_saving_are_reported_after_loading(tmp_path: Path) -> None:
    """The count of bad gradients is part of the state."""
    model = wrapped()
    optimizer = attached(model)
    step(model, optimizer)
    training_of(tunerkit.tuner(model)).gradients.left_out += 3
    part, again = resumed(model, optimizer, tmp_path)
    with pytest.warns(tunerkit.TunerkitWarning, match=r"\b3 of 54 gradients"):
        train(part, again, 5)


@pytest.mark.parametrize("at", [0, 3, 6, 14])
@pytest.mark.parametrize("changes", [{}, {"exact_svd": True}, {"shrink": True}], ids=["masked", "rotated", "shrunk"])
def test_the_values_in_a_file_keep_their_names_and_kinds(at: int, changes: dict[str, Any]) -> None:
    """Older files must load, and new files must keep the format: numbers and flags under these names."""
    values = dict(injection.training_state(tunerkit.tuner(trained(at, **changes))).values)
    svd, shrunk = bool(changes.get("exact_svd")), bool(changes.get("shrink"))
    expected: dict[int, dict[str, object]] = {
        0: {"last_step": 0, "in_force": 12, "blank": True, "averaged": 0, "seen": 0},
        3: {"last_step": 3, "in_force": 12, "averaged": 3, "seen": 27},
        6: {"last_step": 6, "in_force": 9, "anew": svd, "averaged": 0, "seen": 0},
        14: {"last_step": 14, "in_force": 6, "final": True, "shrunk": shrunk, "averaged": 0, "seen": 0},
    }
    flags = dict.fromkeys(("final", "shrunk", "blank", "anew"), False)
    assert values == {"initial": 12, "target": 6, **flags, "left_out": 0, **expected[at]}
    assert all(type(value) is (bool if name in flags else int) for name, value in values.items())


@pytest.mark.parametrize("anew", [False, True])
def test_an_older_file_is_read(anew: bool) -> None:
    """When ranks were final, older files stored `anew` if the last allocation had rotated; it is ignored."""
    state = injection.training_state(tunerkit.tuner(trained(14, exact_svd=True)))
    other = wrapped(exact_svd=True, seed=1)
    optimizer = attached(other)
    restore(tunerkit.tuner(other), State(state.tensors, {**state.values, "anew": anew, "later": [1, 2]}))
    assert injection.training_state(tunerkit.tuner(other)).values == state.values
    train(other, optimizer, 2)
    assert not masked_lambdas(other).any()


def test_an_optimizer_s_state_kept_in_memory_is_of_its_moment() -> None:
    """Training continues and changes the averages; loading the stored state restores the old ones."""
    model = wrapped()
    optimizer = attached(model)
    step(model, optimizer)
    kept, before = optimizer.state_dict(), everything(model)
    step(model, optimizer)
    optimizer.load_state_dict(kept)
    after = everything(model)
    assert tunerkit.tuner(model).steps == 1
    assert all(torch.equal(after["averages"][name], average) for name, average in before["averages"].items())
