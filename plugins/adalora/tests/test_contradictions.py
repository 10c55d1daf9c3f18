"""Files and states that contradict themselves are refused with all contradictions, and change nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tunerkit
from plugins.adalora.tests.short_training import TOTAL, adamw, attached, layers, wrapped
from tunerkit import injection
from tunerkit.serialization.header import digest
from tunerkit_testing.small import net, train

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
FIRST = "0.adapter"


def trained(steps: int, **changes: Any) -> nn.Module:
    model = wrapped(**changes)
    train(model, attached(model), steps)
    return model


def rewritten(path: Path, change: Change) -> Path:
    """The file with other fields or tensors, and a digest that is right."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["tunerkit"])
    change(fields, tensors)
    text = json.dumps(fields)
    target = path.with_name(f"changed-{path.name}")
    safetensors.torch.save_file(tensors, target, {"tunerkit": text, "tunerkit.digest": digest(text, tensors)})
    return target


# --- The adapter's file -----------------------------------------------------------------------------------------------


def more_triplets(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.p"] = torch.ones(len(tensors[f"{FIRST}.p"]), 5)
    tensors[f"{FIRST}.lam"] = torch.ones(5)
    tensors[f"{FIRST}.q"] = torch.ones(5, tensors[f"{FIRST}.q"].shape[1])
    tensors[f"{FIRST}.mask"] = torch.ones(5, dtype=torch.bool)


def live_where_masked(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.mask"] = torch.zeros(4, dtype=torch.bool)
    tensors[f"{FIRST}.lam"] = torch.ones(4)


WRONG_FILES: dict[str, tuple[Change, str]] = {
    "more triplets than init_rank": (more_triplets, "5 triplets, above the initial rank 4"),
    "a smaller init_rank": (
        lambda fields, _: fields["config"].update(init_rank=3, target_rank=1),
        "4 triplets, above the initial rank 3",
    ),
    "masked triplets with a scale": (live_where_masked, "4 masked triplets whose λ is not 0"),
    "a mask of another length": (
        lambda _, tensors: tensors.update({f"{FIRST}.mask": torch.ones(3, dtype=torch.bool)}),
        r"mask: expected bool \(4,\)",
    ),
    "a mask of integers": (
        lambda _, tensors: tensors.update({f"{FIRST}.mask": torch.ones(4, dtype=torch.int8)}),
        "mask is int8, expected bool",
    ),
    "a λ too few": (
        lambda _, tensors: tensors.update({f"{FIRST}.lam": torch.ones(3)}),
        "size mismatch for adapter.lam",
    ),
    "masks of all layers": (
        lambda _, tensors: [
            tensors.update({name: torch.zeros_like(tensor)}) for name, tensor in tensors.items() if "mask" in name
        ],
        "(?s)at 0: .*λ is not 0.*at 2: .*λ is not 0",
    ),
}


@pytest.mark.filterwarnings("ignore:.*budget of")
@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_contradicts_itself_is_not_loaded(tmp_path: Path, name: str) -> None:
    """Masks, λ and ranks that no training leaves behind: each is named, and the base stays as it is."""
    change, words = WRONG_FILES[name]
    path = tunerkit.save(trained(3, exact_svd=True), tmp_path)
    base = net()
    with pytest.raises(tunerkit.errors.FileError, match=words):
        tunerkit.load(base, rewritten(path, change))
    assert tunerkit.adapters(base) == {}


@pytest.mark.filterwarnings("ignore:.*budget of")
@pytest.mark.parametrize("at", [3, 6, 7, 14, TOTAL])
@pytest.mark.parametrize("changes", [{}, {"exact_svd": True}, {"shrink": True}, {"start": "gaussian"}])
def test_what_training_leaves_behind_is_loaded(at: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Between allocations a trained λ moves freely, also under a mask: that is no contradiction."""
    model = trained(at, **changes)
    again = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
    assert tunerkit.tuner(again).ranks() == tunerkit.tuner(model).ranks()
    tunerkit.attach(again, adamw(again), total_steps=TOTAL)
    tunerkit.load_state(again, tunerkit.save_state(model, tmp_path))
    assert (
        injection.training_state(tunerkit.tuner(again)).values == injection.training_state(tunerkit.tuner(model)).values
    )


# --- The training state -----------------------------------------------------------------------------------------------


def first_mask(fill: bool) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["mask.0"] = torch.full_like(tensors["mask.0"], fill)

    return change


def values(**changes: object) -> Change:
    return lambda fields, _: fields["values"].update(changes)


WRONG_STATES: dict[str, tuple[int, Change, str]] = {
    "a mask above the budget": (7, first_mask(True), "the masks keep 10, above the budget 'in_force' 9"),
    "a mask below the history": (7, first_mask(False), r"is inconsistent.*allocation -> state\): 0 "),
    "an initial budget of nothing": (7, values(initial=10), "the adapter's triplets cost 12, above 'initial' 10"),
    "an initial budget beyond init_rank": (3, values(initial=10**9), "'initial' 1000000000 is above 12"),
    "a target beyond the config": (3, values(target=12), "'target' 12 is above 6, which the config asks for"),
    "not final at the end": (
        13,
        lambda fields, _: (fields.update(steps=14), fields["values"].update(last_step=14)),
        "'final' is false after step 14, but the ranks are final from 14 on",
    ),
    "shrunk with masks": (14, values(shrunk=True), "'shrunk' is true, but the masks keep 6 of 12"),
    "another step": (7, values(last_step=6), "'last_step' is 6 after 7 steps"),
    "more averaged than taken": (3, values(averaged=4), "'averaged' 4 is above 'last_step' 3"),
    "more gradients than there are": (3, values(seen=28), "'seen' is 28, above 27: 3 averaged steps of 3 layers"),
    "averages before the first step": (
        0,
        lambda _, tensors: tensors["uncertainty.2"].fill_(1),
        "'uncertainty.2' has averages, but 'blank' says",
    ),
    "negative averages": (
        3,
        lambda _, tensors: [tensors[f"sensitivity.{n}"].neg_() for n in range(9)],
        "(?s)'sensitivity.0' has negative.*'sensitivity.8' has negative",
    ),
    "integers for averages": (
        3,
        lambda _, tensors: tensors.update({"sensitivity.0": tensors["sensitivity.0"].to(torch.int64)}),
        "do not fit",
    ),
    "several at once": (
        7,
        lambda fields, tensors: (first_mask(True)(fields, tensors), values(seen=10**6, target=9)(fields, tensors)),
        "(?s)the masks keep 10.*'target' 9 is above 6.*'seen' is 1000000",
    ),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_state_that_contradicts_itself_changes_nothing(tmp_path: Path, name: str) -> None:
    """Every contradiction is in the error; masks, state, steps and history stay as they are."""
    at, change, words = WRONG_STATES[name]
    path = tunerkit.save_state(trained(at), tmp_path)
    model = wrapped(seed=1)
    train(model, attached(model), 5)
    tuner = tunerkit.tuner(model)
    before = {name: tensor.clone() for name, tensor in injection.training_state(tuner).tensors.items()}
    said = (injection.training_state(tuner).values, tuner.steps, list(tuner.history), tuner.ranks())
    weights = [tensor.clone() for layer in layers(model) for tensor in (*layer.weights, layer.mask)]
    with pytest.raises((tunerkit.errors.FileError, tunerkit.errors.StepError), match=words):
        tunerkit.load_state(model, rewritten(path, change))
    after = injection.training_state(tuner)
    assert (after.values, tuner.steps, list(tuner.history), tuner.ranks()) == said
    assert after.tensors.keys() == before.keys()
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.items())
    now = [tensor for layer in layers(model) for tensor in (*layer.weights, layer.mask)]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))


@pytest.mark.parametrize("name", ["initial", "final", "left_out", "mask.2", "sensitivity.8", "uncertainty.0"])
def test_a_file_that_lacks_one_value_changes_nothing(tmp_path: Path, name: str) -> None:
    """Each value and each tensor is needed; without it, masks and averages stay, and training goes on."""

    def drop(fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        (tensors if "." in name else fields["values"]).pop(name)

    path = tunerkit.save_state(trained(7), tmp_path)
    model = wrapped(seed=1)
    optimizer = attached(model)
    train(model, optimizer, 5)
    tuner = tunerkit.tuner(model)
    ranks, masks = tuner.ranks(), [layer.mask.clone() for layer in layers(model)]
    with pytest.raises((tunerkit.errors.FileError, tunerkit.errors.StepError)):
        tunerkit.load_state(model, rewritten(path, drop))
    assert (tuner.ranks(), tuner.steps) == (ranks, 5)
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), masks, strict=True))
    train(model, optimizer, TOTAL - 5)
    assert sum(tuner.ranks().values()) == 6
