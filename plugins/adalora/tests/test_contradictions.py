"""Files and states that contradict themselves are refused with all contradictions, and change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tunerkit
from plugins.adalora.tests.short_training import TOTAL, adamw, attached, everything, same, trained, wrapped
from tests.support.adapter_files import rewritten
from tunerkit import injection
from tunerkit.errors import FileError, StepError
from tunerkit.plugin import State
from tunerkit_adalora.contradictions import impossible_averages
from tunerkit_adalora.phase import Phase
from tunerkit_adalora.state import restore
from tunerkit_testing.small import net, train

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
FIRST = "0.adapter"

# --- The adapter's file -----------------------------------------------------------------------------------------------


def tensors(**changes: Tensor) -> Change:
    """Other tensors of the first layer."""
    return lambda _, found: found.update({f"{FIRST}.{name}": tensor for name, tensor in changes.items()})


FIVE = {"p": torch.ones(8, 5), "lam": torch.ones(5), "q": torch.ones(5, 6), "mask": torch.ones(5, dtype=torch.bool)}
WRONG_FILES: dict[str, tuple[Change, str]] = {
    "more triplets than init_rank": (tensors(**FIVE), "5 triplets, above the initial rank 4"),
    "a smaller init_rank": (
        lambda fields, _: fields["config"].update(init_rank=3, target_rank=1),
        "4 triplets, above the initial rank 3",
    ),
    "masked triplets with a scale": (
        tensors(mask=torch.zeros(4, dtype=torch.bool), lam=torch.ones(4)),
        "4 masked triplets whose λ is not 0",
    ),
    "a mask of another length": (tensors(mask=torch.ones(3, dtype=torch.bool)), r"mask: expected bool \(4,\)"),
    "a mask of integers": (tensors(mask=torch.ones(4, dtype=torch.int8)), "mask is int8, expected bool"),
    "a λ too few": (tensors(lam=torch.ones(3)), "size mismatch for adapter.lam"),
    "masks of all layers": (
        lambda _, found: found.update({n: torch.zeros_like(tensor) for n, tensor in found.items() if "mask" in n}),
        "(?s)at 0: .*λ is not 0.*at 2: .*λ is not 0",
    ),
}


@pytest.mark.filterwarnings("ignore:.*budget of")
@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_contradicts_itself_is_not_loaded(tmp_path: Path, name: str) -> None:
    """Masks, λ and ranks that no training leaves behind: each is named, and the base stays as it is."""
    change, words = WRONG_FILES[name]
    path = rewritten(tunerkit.save(trained(3, exact_svd=True), tmp_path), tmp_path / "changed.safetensors", change)
    base = net()
    with pytest.raises(FileError, match=words):
        tunerkit.load(base, path)
    assert tunerkit.adapters(base) == {}


@pytest.mark.filterwarnings("ignore:.*budget of")
@pytest.mark.parametrize("at", [3, 6, 7, 14, TOTAL])
@pytest.mark.parametrize(
    "changes",
    [{}, {"exact_svd": True}, {"shrink": True}, {"start": "gaussian"}],
    ids=["plain", "SVD form", "shrunk", "Gaussian"],
)
def test_what_training_leaves_behind_is_loaded(at: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Between allocations a trained λ moves freely, also under a mask: that is no contradiction."""
    model = trained(at, **changes)
    again = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
    assert tunerkit.tuner(again).ranks() == tunerkit.tuner(model).ranks()
    tunerkit.attach(again, adamw(again), total_steps=TOTAL)
    tunerkit.load_state(again, tunerkit.save_state(model, tmp_path))
    found, expected = (injection.training_state(tunerkit.tuner(each)).values for each in (again, model))
    assert found == expected


# --- The training state -----------------------------------------------------------------------------------------------


def first_mask(fill: bool) -> Change:
    return lambda _, found: found.update({"mask.0": torch.full_like(found["mask.0"], fill)})


def values(**changes: object) -> Change:
    return lambda fields, _: fields["values"].update(changes)


def both(*changes: Change) -> Change:
    return lambda fields, found: [change(fields, found) for change in changes]


def without(part: str) -> Change:
    """Without a tensor, or without a value."""
    return lambda fields, found: (found if "." in part else fields["values"]).pop(part)


# The step at which the state was saved, the change, and the error's words.
WRONG_STATES: dict[str, tuple[int, Change, str]] = {
    "a mask above the budget": (7, first_mask(True), "the masks keep 10, above the budget 'in_force' 9"),
    "a mask below the history": (7, first_mask(False), r"is inconsistent.*allocation -> state\): 0 "),
    "an initial budget of nothing": (7, values(initial=10), "the adapter's triplets cost 12, above 'initial' 10"),
    "an initial budget beyond init_rank": (3, values(initial=10**9), "'initial' 1000000000 is above 12"),
    "a target beyond the config": (3, values(target=12), "'target' 12 is above 6, which the config asks for"),
    "not final at the end": (
        13,
        both(lambda fields, _: fields.update(steps=14), values(last_step=14)),
        "'final' is false after step 14, but the ranks are final from 14 on",
    ),
    "shrunk with masks": (14, values(shrunk=True), "'shrunk' is true, but the masks keep 6 of 12"),
    "another step": (7, values(last_step=6), "'last_step' is 6 after 7 steps"),
    "more averaged than taken": (3, values(averaged=4), "'averaged' 4 is above 'last_step' 3"),
    "more gradients than there are": (3, values(seen=28), "'seen' is 28, above 27: 3 averaged steps of 3 layers"),
    "averages before the first step": (
        0,
        lambda _, found: found["uncertainty.2"].fill_(1),
        "'uncertainty.2' has averages, but 'blank' says",
    ),
    "negative averages": (
        3,
        lambda _, found: [found[f"sensitivity.{n}"].sub_(1e9) for n in (0, 8)],
        "(?s)'sensitivity.0' has negative.*'sensitivity.8' has negative",
    ),
    "integers for averages": (
        3,
        lambda _, found: found.update({"sensitivity.0": found["sensitivity.0"].to(torch.int64)}),
        "do not fit this adapter: 'sensitivity.0' has another shape or dtype",
    ),
    "a mask of another rank": (
        7,
        lambda _, found: found.update({"mask.1": found["mask.1"][:1].clone()}),
        "do not fit this adapter: 'mask.1' has another shape or dtype",
    ),
    "averages of a weight too many": (
        7,
        lambda _, found: found.update({"sensitivity.9": torch.ones(2)}),
        "do not fit this adapter: 'sensitivity.9' is not expected",
    ),
    **{
        f"no {part}": (
            7,
            without(part),
            rf"changed\.safetensors: .*'{part}' is missing.* Load a state that was saved together with the adapter's",
        )
        for part in ("initial", "final", "left_out", "mask.2", "sensitivity.8", "uncertainty.0")
    },
    "several at once": (
        7,
        both(first_mask(True), values(seen=10**6, target=9)),
        "(?s)the masks keep 10.*'target' 9 is above 6.*'seen' is 1000000",
    ),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_state_that_contradicts_itself_changes_nothing(tmp_path: Path, name: str) -> None:
    """The file and every contradiction are in the error; masks, averages, steps and history stay as they are."""
    at, change, words = WRONG_STATES[name]
    path = rewritten(tunerkit.save_state(trained(at), tmp_path), tmp_path / "changed.safetensors", change)
    model = wrapped(seed=1)
    train(model, attached(model), 5)
    before = everything(model)
    with pytest.raises((FileError, StepError), match=words):
        tunerkit.load_state(model, path)
    assert same(everything(model), before)


@pytest.mark.parametrize("name", ["no final", "no mask.2", "negative averages", "several at once"])
def test_all_is_checked_before_anything_is_restored(name: str) -> None:
    """Whether or not the caller puts back what it had."""
    at, change, _ = WRONG_STATES[name]
    state = injection.training_state(tunerkit.tuner(trained(at)))
    fields, found = {"values": dict(state.values)}, {key: tensor.clone() for key, tensor in state.tensors.items()}
    change(fields, found)
    model = wrapped(seed=1)
    train(model, attached(model), 9)
    before, kept = everything(model), tunerkit.tuner(model).state
    with pytest.raises((FileError, StepError)):
        restore(tunerkit.tuner(model), State(found, fields["values"]))
    assert tunerkit.tuner(model).state is kept
    assert same(everything(model), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_averages_that_no_training_has_are_named(value: float) -> None:
    """They are means of absolute values, and a score would never recover from NaN."""
    averages = {"sensitivity.0": torch.ones(2, 3), "uncertainty.0": torch.tensor([1.0, value])}
    assert [*impossible_averages(averages, Phase.AVERAGING)] == ["'uncertainty.0' has negative or non-finite averages"]


@pytest.mark.parametrize(("lost", "end"), [(12, r"\."), (13, r"; and 1 more\.")])
def test_the_first_twelve_problems_of_a_state_are_named_and_the_others_counted(
    lost: int, end: str, tmp_path: Path
) -> None:
    """There may be a problem for each weight. Nothing is counted where all are named."""
    model, names = trained(7), [f"{kind}.{number}" for kind in ("sensitivity", "uncertainty") for number in range(9)]

    def lose(_: dict[str, Any], found: dict[str, Tensor]) -> None:
        for name in names[:lost]:
            del found[name]

    path = rewritten(tunerkit.save_state(model, tmp_path), tmp_path / "changed.safetensors", lose)
    with pytest.raises(StepError, match="; ".join(f"'{name}' is missing" for name in names[:12]) + end):
        tunerkit.load_state(model, path)


def test_a_state_of_another_config_or_of_a_shrunk_adapter_is_refused(tmp_path: Path) -> None:
    """Averages of another config's ranks, or the masks of a shrunk adapter for one that still has all triplets."""
    path = tunerkit.save_state(trained(shrink=True), tmp_path)
    for rank, words in ((5, "init_rank 4 -> 5"), (4, "do not fit")):
        other = trained(0, shrink=True, init_rank=rank)
        before = everything(other)
        with pytest.raises((FileError, StepError), match=words):
            tunerkit.load_state(other, path)
        assert same(everything(other), before)
