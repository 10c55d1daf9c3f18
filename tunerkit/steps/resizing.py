"""Resize parameters in place, with their gradients and optimizer state; the Parameter objects stay the same."""

import inspect
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

# These update each element from its own gradient and state only, so removing other elements does not affect it. That is
# wrong for optimizers that use the whole tensor: Adafactor, Muon, LBFGS, or 8-bit states in blocks.
_ELEMENTWISE = (ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop)


@attrs.frozen(eq=False)
class Cut:
    """Which entries of a parameter to keep.

    Attributes:
        parameter: The parameter to shrink.
        dim: The dimension along which to select.
        kept: The indices to keep, (k,) int64, in the order of the result.
    """

    parameter: nn.Parameter
    dim: int
    kept: Tensor


def shrink_(cuts: Sequence[Cut], optimizer: Optimizer | None) -> str | None:
    """Shrink parameters, with their gradients and optimizer state, which frees memory.

    The Parameter objects stay the same; their data moves to smaller storage.

    Args:
        cuts: What to keep of each parameter.
        optimizer: The optimizer that holds the parameters, if there is one.

    Returns:
        None if all cuts were made. Otherwise none was made, and the text says why the shapes must not change: a process
        group is running, or ``optimizer`` is not known to work elementwise.
    """
    reason = _obstacle([cut.parameter for cut in cuts], optimizer) if cuts else None
    if reason is None:
        for cut in cuts:
            _cut_(cut, optimizer)
    return reason


@torch.no_grad()
def resize_(parameter: nn.Parameter, values: Tensor) -> None:
    """Replace a parameter's values in place; its gradient is dropped.

    Args:
        parameter: The parameter to change.
        values: The new values, of any shape.
    """
    # While a loss of an earlier step is alive, autograd keeps the node that accumulates this gradient, with the old
    # shape. Changing the dtype makes autograd discard that node, hence the detour.
    parameter.grad = None
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = values


def _obstacle(parameters: Sequence[nn.Parameter], optimizer: Optimizer | None) -> str | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is initialised, and DDP and FSDP do not allow shapes to change"
    for parameter in parameters:
        if type(parameter.data) is not Tensor:
            return f"a parameter is a {type(parameter.data).__name__}, whose shape must not be changed"
    if optimizer is None:
        return None
    name = type(optimizer).__name__
    if inspect.unwrap(type(optimizer).step) not in {inspect.unwrap(kind.step) for kind in _ELEMENTWISE}:
        return f"{name} is not known to update each element independently"
    states = ((p, key, value) for p in parameters for key, value in _tensors_of(optimizer, p).items())
    odd = {key for p, key, value in states if value.shape != p.shape}
    return f"{name} keeps {', '.join(sorted(odd))} in a shape other than the parameter's" if odd else None


def _tensors_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer state of a parameter without single numbers, such as a step count, which have no shape."""
    # `state` is a defaultdict: a lookup would add an empty entry, which optimizers take for an initialised one.
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0}


@torch.no_grad()
def _cut_(cut: Cut, optimizer: Optimizer | None) -> None:
    parameter = cut.parameter
    kept = cut.kept.to(parameter.device)
    grad = parameter.grad
    if optimizer is not None:
        for key, value in _tensors_of(optimizer, parameter).items():
            optimizer.state[parameter][key] = value.index_select(cut.dim, kept.to(value.device))
    resize_(parameter, parameter.data.index_select(cut.dim, kept))
    parameter.grad = None if grad is None else grad.index_select(cut.dim, kept)
