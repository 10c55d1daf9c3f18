"""Shrink and grow parameters in place, with their gradients, and complete the optimizer's state of them."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Size, Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from tunerkit.errors import AdapterError
from tunerkit.hooks import Engine
from tunerkit.injection import Tuner
from tunerkit.layers import resize_, torch_private

# These update each element from its own gradient and state only, so removing other elements does not affect it. That is
# wrong for optimizers that use the whole tensor: Adafactor, Muon, LBFGS, or 8-bit states in blocks.
_ELEMENTWISE = (ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop)
# Their states that do not start at 0, with the setting that they start at: Adagrad's and Rprop's.
_FRESH = {"sum": "initial_accumulator_value", "step_size": "lr"}
_AVERAGE = "ax"  # ASGD's average of the values so far

# An optimizer does not know what trains with it, and resizing is given nothing but an optimizer.
_engines: WeakKeyDictionary[Optimizer, Engine] = WeakKeyDictionary()


def note_engine(optimizer: Optimizer, engine: Engine | None) -> None:
    """Note what the processes of a training with this optimizer do together; None for one that is alone."""
    if engine is None:
        _engines.pop(optimizer, None)
    else:
        _engines[optimizer] = engine


def optimizer_of(tuner: Tuner) -> Optimizer | None:
    """Return the optimizer that drives an adapter, or that drove it last.

    Args:
        tuner: The adapter's handle.

    Returns:
        The optimizer; None if the adapter was never attached, or if the optimizer no longer exists.
    """
    link = tuner.progress.link
    return None if link is None else link.optimizer()


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
        is_plain = len({id(cut.parameter) for cut in cuts}) == len(cuts)
        with torch.no_grad():
            for some in [cuts] if is_plain else [[cut] for cut in cuts]:  # a parameter may be cut along two dimensions
                _replace_([_cut(cut, optimizer) for cut in some], optimizer)
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
        with torch.no_grad():
            _replace_([_grown(growth, optimizer) for growth in growths], optimizer)
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
    engine = None if optimizer is None else _engines.get(optimizer)
    if engine is None and torch.distributed.is_available() and torch.distributed.is_initialized():
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


@attrs.frozen(eq=False)
class _Resized:
    """The new values of a parameter, its new gradient, and its new states in the optimizer by name."""

    parameter: nn.Parameter
    values: Tensor
    grad: Tensor | None
    states: Mapping[str, Tensor]


def _replace_(resized: Sequence[_Resized], optimizer: Optimizer | None) -> None:
    for each in resized:
        resize_(each.parameter, each.values)
        each.parameter.grad = each.grad
        if optimizer is not None and each.states:
            optimizer.state[each.parameter].update(each.states)
    if optimizer is not None and (engine := _engines.get(optimizer)) is not None:
        engine.resized_()


def _tensors_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer state of a parameter without single numbers, such as a step count, which have no shape."""
    # `state` is a defaultdict: a lookup would add an empty entry, which optimizers take for an initialised one.
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0}


def _cut(cut: Cut, optimizer: Optimizer | None) -> _Resized:
    parameter, kept = cut.parameter, cut.kept.to(cut.parameter.device)
    grad = None if parameter.grad is None else parameter.grad.index_select(cut.dim, kept)
    states = {} if optimizer is None else _tensors_of(optimizer, parameter)
    smaller = {key: value.index_select(cut.dim, kept.to(value.device)) for key, value in states.items()}
    return _Resized(parameter, parameter.data.index_select(cut.dim, kept), grad, smaller)


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


def _grown(growth: Growth, optimizer: Optimizer | None) -> _Resized:
    parameter, dim = growth.parameter, growth.dim
    grad, states = parameter.grad, {}
    if optimizer is not None:
        group = next((group for group in optimizer.param_groups if any(p is parameter for p in group["params"])), {})
        for key, value in _tensors_of(optimizer, parameter).items():
            states[key] = torch.cat([value, _fresh_state(key, growth, group, value)], dim)
    grad = None if grad is None else torch.cat([grad, grad.new_zeros(growth.values.shape)], dim)
    return _Resized(
        parameter, torch.cat([parameter.data, growth.values.detach().to(parameter.data)], dim), grad, states
    )


def _fresh_state(key: str, growth: Growth, group: Mapping[str, Any], like: Tensor) -> Tensor:
    """Return an optimizer's state of new entries: that of entries which had no gradient so far."""
    if key == _AVERAGE:
        return growth.values.to(like)
    setting = _FRESH.get(key)
    # A scheduler keeps the learning rate that training began with, which is Rprop's first step size.
    first = 0.0 if setting is None else float(group.get(f"initial_{setting}", group[setting]))
    return like.new_full(growth.values.shape, first)


def complete_(tuner: Tuner, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Add a state of 0 for each parameter of the adapter that has none, such as one withheld from every step.

    Torch's distributed checkpoint wants a state of all that is trained: `set_optimizer_state_dict` rejects what
    `get_optimizer_state_dict` has returned without it. Elsewhere, and if the states of the optimizer have other shapes
    than its parameters, this does nothing.
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
                states[key] = {name: _untouched(name, value, parameter) for name, value in known[0][1].items()}


def _is_elementwise(state: Mapping[str, Any], shape: Size) -> bool:
    """Whether the tensors in a parameter's state have its shape, other than numbers."""
    return all(value.shape == shape for value in state.values() if isinstance(value, Tensor) and value.ndim)


def _untouched(name: str, value: Any, parameter: nn.Parameter) -> Any:
    """What ``parameter`` has where another parameter's state has ``value``: 0, and the same settings."""
    if isinstance(value, Tensor) and value.ndim:
        return torch.zeros_like(parameter, dtype=value.dtype)
    if name != "step":
        return value
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0
