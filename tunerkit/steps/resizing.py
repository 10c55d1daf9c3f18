"""Shrink and grow parameters in place, with their gradients and optimizer state; Parameter objects stay the same."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from tunerkit.engine import Alone
from tunerkit.errors import AdapterError
from tunerkit.layers import resize_
from tunerkit.steps.links import engine_of

# These update each element from its own gradient and state only, so removing other elements does not affect it. That is
# wrong for optimizers that use the whole tensor: Adafactor, Muon, LBFGS, or 8-bit states in blocks.
_ELEMENTWISE = (ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop)
# Their states that do not start at 0, with the setting that they start at: Adagrad's and Rprop's.
_FRESH = {"sum": "initial_accumulator_value", "step_size": "lr"}
_AVERAGE = "ax"  # ASGD's average of the values so far


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


@attrs.frozen(eq=False)
class Growth:
    """Entries to append to a parameter.

    Attributes:
        parameter: The parameter to grow.
        dim: The dimension along which to append.
        values: The new entries: the parameter's shape, with k in place of its size in ``dim``.
    """

    parameter: nn.Parameter
    dim: int
    values: Tensor


def shrink_(cuts: Sequence[Cut], optimizer: Optimizer | None) -> str | None:
    """Shrink parameters, with their gradients and optimizer state, which frees memory.

    The Parameter objects stay the same; their data moves to smaller storage. In a process group, call this in all
    processes, with cuts to the same shapes, between two backwards: DistributedDataParallel gets a new reducer then.

    Args:
        cuts: What to keep of each parameter.
        optimizer: The optimizer that holds the parameters, if there is one.

    Returns:
        None if all cuts were made. Otherwise none was made, and the text is that of `resize_obstacle`.
    """
    reason = resize_obstacle([cut.parameter for cut in cuts], optimizer) if cuts else None
    if cuts and reason is None:
        for cut in cuts:
            _cut_(cut, optimizer)
        _tell_engine(optimizer)
    return reason


def grow_(growths: Sequence[Growth], optimizer: Optimizer | None) -> str | None:
    """Grow parameters, with their gradients and optimizer state, as if the new entries had been there untouched.

    The Parameter objects stay the same. The gradient of a new entry is 0, and the optimizer's state of it is that of an
    entry which has had no gradient yet. A step count, which an optimizer keeps for a whole parameter, stays. In a
    process group, call this in all processes, with the same values, between two backwards.

    Args:
        growths: What to append to each parameter.
        optimizer: The optimizer that holds the parameters, if there is one.

    Returns:
        None if all have grown. Otherwise none has, and the text is that of `resize_obstacle`. Ask that before training,
        for example in ``tunerkit_start``, if your method cannot do without growing.

    Raises:
        AdapterError: The new entries of one of them have another shape, or it is listed twice; nothing has grown then.
    """
    for growth in growths:
        _refuse_misshapen(growth)
    if len({id(growth.parameter) for growth in growths}) < len(growths):
        raise AdapterError("a parameter is listed twice in one call of grow_; call it once for each dimension")
    reason = resize_obstacle([growth.parameter for growth in growths], optimizer) if growths else None
    if growths and reason is None:
        for growth in growths:
            _grow_(growth, optimizer)
        _tell_engine(optimizer)
    return reason


def resize_obstacle(parameters: Iterable[nn.Parameter], optimizer: Optimizer | None) -> str | None:
    """Say why `shrink_` and `grow_` would leave the shapes of parameters alone.

    Args:
        parameters: The parameters to resize.
        optimizer: The optimizer that holds them, if there is one.

    Returns:
        None if they can be resized, in all processes alike. Otherwise the reason: what trains them in a process group
        needs shapes that stay, such as a DistributedDataParallel that cannot be rebuilt; a parameter is sharded; or
        ``optimizer`` is not known to update each element independently.
    """
    parameters = list(parameters)
    engine = engine_of(optimizer)
    alone = engine is None or type(engine) is Alone  # which knows of no processes
    if alone and torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is initialised, and DDP and FSDP do not allow shapes to change"
    if engine is not None and (reason := engine.fixed_shapes) is not None:
        return reason
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


def _tell_engine(optimizer: Optimizer | None) -> None:
    engine = engine_of(optimizer)
    if engine is not None:
        engine.resized_()


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


def _refuse_misshapen(growth: Growth) -> None:
    own, new, dim = growth.parameter.shape, growth.values.shape, growth.dim
    if (
        not -len(own) <= dim < len(own)
        or len(new) != len(own)
        or new[:dim] + new[dim:][1:] != own[:dim] + own[dim:][1:]
    ):
        raise AdapterError(
            f"cannot grow a parameter of shape {tuple(own)} along dimension {dim} by values of shape {tuple(new)}: "
            "they must agree in every other dimension"
        )


@torch.no_grad()
def _grow_(growth: Growth, optimizer: Optimizer | None) -> None:
    parameter, dim = growth.parameter, growth.dim
    grad = parameter.grad
    if optimizer is not None:
        group = next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), {})
        for key, value in _tensors_of(optimizer, parameter).items():
            optimizer.state[parameter][key] = torch.cat([value, _fresh_state(key, growth, group, value)], dim)
    resize_(parameter, torch.cat([parameter.data, growth.values.detach().to(parameter.data)], dim))
    parameter.grad = None if grad is None else torch.cat([grad, grad.new_zeros(growth.values.shape)], dim)


def _fresh_state(key: str, growth: Growth, group: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return an optimizer's state of new entries: that of entries which had no gradient so far."""
    if key == _AVERAGE:
        return growth.values.to(like)
    setting = _FRESH.get(key)
    # A scheduler keeps the learning rate that training began with, which is Rprop's first step size.
    first = 0.0 if setting is None else float(group.get(f"initial_{setting}", group[setting]))
    return like.new_full(growth.values.shape, first)
