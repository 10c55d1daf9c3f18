"""Complete an optimizer's state_dict for torch's distributed checkpoint, which wants a state of all that is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.optim import Optimizer

from tunerkit.injection import Tuner
from tunerkit.libraries import torch_private


def complete_(tuner: Tuner, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Add a state of 0 for each parameter of the adapter that has none, such as one withheld from every step.

    Without it, `set_optimizer_state_dict` rejects what `get_optimizer_state_dict` has returned. Elsewhere, and if the
    states of the optimizer have other shapes than its parameters, this does nothing.
    """
    if not torch_private.in_distributed_checkpoint():
        return
    own = {id(parameter) for parameter in tuner.parameters() if parameter.requires_grad}
    states = state_dict["state"]
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        pairs = list(zip(group["params"], saved["params"], strict=True))
        known = [(parameter, states[key]) for parameter, key in pairs if states.get(key)]
        if not (known and _is_elementwise(known[0][1], known[0][0].shape)):
            continue
        for parameter, key in pairs:
            if id(parameter) in own and not states.get(key):
                states[key] = {name: _fresh(name, value, parameter) for name, value in known[0][1].items()}


def _is_elementwise(state: Mapping[str, Any], shape: Size) -> bool:
    """Whether the tensors in a parameter's state have its shape, other than numbers."""
    return all(value.shape == shape for value in state.values() if isinstance(value, Tensor) and value.ndim)


def _fresh(name: str, value: Any, parameter: nn.Parameter) -> Any:
    """What ``parameter`` has where another parameter's state has ``value``: 0, and the same settings."""
    if isinstance(value, Tensor) and value.ndim:
        return torch.zeros_like(parameter, dtype=value.dtype)
    if name != "step":
        return value
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0
