"""Gather the state of an optimizer with sharded parameters for a file, and shard it again at loading."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tunerkit_distributed.dtensors import cut_of, gathered_tensors, is_split, shard_like


@torch.no_grad()
def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` with gathered tensors. All ranks must call this."""
    state: dict[str, Any] = optimizer.state_dict()
    places = [
        (own, name)
        for own in state["state"].values()
        for name, value in own.items()
        if isinstance(value, Tensor) and is_split(value)
    ]
    whole = gathered_tensors([own[name] for own, name in places], "the optimizer's state")
    copies = {index: dict(own) for index, own in state["state"].items()}
    by_id = {id(own): copies[index] for index, own in state["state"].items()}
    for (own, name), value in zip(places, whole, strict=True):
        by_id[id(own)][name] = value
    return {**state, "state": copies}


@torch.no_grad()
def own_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's shards of a gathered state, for ``optimizer.load_state_dict``.

    Args:
        optimizer: The optimizer to load into; the state may be from another number of ranks.
        state: The state that `whole_state` returned.
    """
    groups = zip(optimizer.param_groups, state["param_groups"], strict=False)
    parameters = {
        index: parameter
        for here, there in groups
        for parameter, index in zip(here["params"], there["params"], strict=False)
    }
    return {**state, "state": {index: _own(parameters.get(index), own) for index, own in state["state"].items()}}


def _own(parameter: Any, state: dict[str, Any]) -> dict[str, Any]:
    if parameter is None or not is_split(parameter):
        return state
    cut, number = cut_of(parameter)
    return {
        name: shard_like(parameter, cut.part(value, number))
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in state.items()
    }
