"""SHiRA trains as many entries as it says, and those that PEFT would."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import TargetError
from tunerkit_methods.shira import Sparse


def sparse(settings: dict[str, object], base: nn.Module) -> Sparse:
    model = tunerkit.wrap(nn.Sequential(base), "shira", {"targets": ["0"], **settings})
    adapter = tunerkit.tuner(model).adapters()["0"]
    assert isinstance(adapter, Sparse)
    return adapter


@pytest.mark.parametrize("seed", [None, 5])
def test_draws_the_entries_that_peft_draws(seed: int | None) -> None:
    """From the same seed, also from none."""
    config = peft.ShiraConfig(r=3, random_seed=seed, target_modules=["0"])
    theirs: Any = peft.get_peft_model(copy.deepcopy(nn.Sequential(nn.Linear(12, 20))), config)
    layer = theirs.base_model.model.get_submodule("0")
    ours = sparse({"rank": 3, "mask_seed": seed}, nn.Linear(12, 20))
    assert torch.equal(ours.positions, layer.shira_indices["default"])


def test_has_as_many_values_as_lora_or_all_entries_by_default() -> None:
    """Rank · (out + in), each entry once; a layer with fewer entries is trained in full."""
    assert len(sparse({"rank": 3}, nn.Linear(12, 20)).values) == 3 * 32
    small = sparse({}, nn.Linear(4, 3))
    assert len(small.values) == len(small.positions.unique(dim=1).T) == 12
    with pytest.raises(TargetError, match="rank is 9, and at most 8 fits"):
        sparse({"rank": 9}, nn.Linear(12, 20))
