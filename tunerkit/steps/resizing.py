"""Shrink and grow parameters in place, with their gradients and optimizer state."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from tunerkit.errors import AdapterError
from tunerkit.hooks import Engine
from tunerkit.injection import Tuner
from tunerkit.layers import resize_, torch_private

# These update each element from its own gradient and state only, so removing other elements does not affect it. Others
# use the whole tensor: Adafactor, Muon, LBFGS, or 8-bit states in blocks.
_ELEMENTWISE = (ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop)
# States that do not start at 0 (of Adagrad and Rprop), with the setting that has their initial value.
_FRESH = {"sum": "initial_accumulator_value", "step_size": "lr"}
_AVERAGE = "ax"  # ASGD's average of the values so far

# The optimizer's attribute for the engine of its training, since resizing functions get nothing but an optimizer.
ENGINE = "_tunerkit_engine"


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
    """Shrink parameters with their gradients and optimizer state, to free memory.

    The Parameter objects stay the same; their data moves to smaller storage, one parameter at a time. In a process
    group, call this in all processes, with the same resulting shapes, between two backwards: DistributedDataParallel
    gets a new reducer then.

    Args:
        cuts: The entries to keep, one `Cut` per parameter.
        optimizer: The optimizer that has the parameters, if there is one.

    Returns:
        None if all cuts were made; otherwise the reason from `resize_obstacle`, and nothing was changed.
    """
    reason = resize_obstacle([cut.parameter for cut in cuts], optimizer) if cuts else None
    if not cuts or reason is not None:
        return reason
    engine = _engine_of(optimizer)
    with torch.no_grad():
        for cut in cuts:
            parameter, dim, kept = cut.parameter, cut.dim, cut.kept.to(cut.parameter.device)
            grad = None if parameter.grad is None else parameter.grad.index_select(dim, kept)
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:  # not a single number, such as a step count
                    state[key] = value.index_select(dim, kept.to(value.device))
            resize_(parameter, parameter.data.index_select(dim, kept))
            parameter.grad = grad
    engine.resized_()
    return None


def grow_(growths: Sequence[Growth], optimizer: Optimizer | None) -> str | None:
    """Grow parameters with their gradients and optimizer state, as if the new entries had never had a gradient.

    The Parameter objects stay the same. A new entry has gradient 0 and the optimizer's initial state; the step count of
    its parameter stays. In a process group, call this in all processes, with the same values, between two backwards.

    Args:
        growths: The entries to append, one `Growth` per parameter.
        optimizer: The optimizer that has the parameters, if there is one.

    Returns:
        None if all have grown; otherwise the reason from `resize_obstacle`, and nothing was changed. A method that
        cannot work without growing should call `resize_obstacle` before training, for example in ``tunerkit_start``.

    Raises:
        AdapterError: New entries have a wrong shape, or a parameter is listed twice. Nothing was changed.
    """
    for growth in growths:
        _refuse_misshapen(growth)
    if len({id(growth.parameter) for growth in growths}) < len(growths):
        raise AdapterError("a parameter is listed twice in one call of grow_; call it once for each dimension")
    reason = resize_obstacle([growth.parameter for growth in growths], optimizer) if growths else None
    if not growths or reason is not None:
        return reason
    engine, groups = _engine_of(optimizer), [] if optimizer is None else optimizer.param_groups
    with torch.no_grad():
        for growth in growths:
            parameter, dim, new, grad = growth.parameter, growth.dim, growth.values, growth.parameter.grad
            grad = None if grad is None else torch.cat([grad, grad.new_zeros(new.shape)], dim)
            settings = next((group for group in groups if any(p is parameter for p in group["params"])), {})
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = torch.cat([value, _fresh(key, new.to(value), settings)], dim)
            resize_(parameter, torch.cat([parameter.data, new.to(parameter.data)], dim))
            parameter.grad = grad
    engine.resized_()
    return None


def resize_obstacle(parameters: Iterable[nn.Parameter], optimizer: Optimizer | None) -> str | None:
    """Return the reason why `shrink_` and `grow_` cannot resize parameters, or None.

    Args:
        parameters: The parameters to resize.
        optimizer: The optimizer that has the parameters, if there is one.

    Returns:
        None if they can be resized, equally in all processes. Otherwise the reason: the engine needs fixed shapes, a
        parameter is sharded, or ``optimizer`` is not known to update each element independently.
    """
    parameters = list(parameters)
    if (reason := _engine_of(optimizer).fixed_shapes) is not None:
        return reason
    for parameter in parameters:
        if type(parameter.data) is not Tensor:
            return f"a parameter is a {type(parameter.data).__name__}, whose shape must not be changed"
    if optimizer is None:
        return None
    name = type(optimizer).__name__
    if inspect.unwrap(type(optimizer).step) not in {inspect.unwrap(kind.step) for kind in _ELEMENTWISE}:
        return f"{name} is not known to update each element independently"
    # `state` is a defaultdict: a lookup would add an empty entry, which optimizers take for an initialized one.
    odd = {key for p in parameters for key in _odd(optimizer.state.get(p, {}), p)}
    return f"{name} keeps {', '.join(sorted(odd))} in a shape other than the parameter's" if odd else None


def _engine_of(optimizer: Optimizer | None) -> Engine:
    found: Engine | None = None if optimizer is None else vars(optimizer).get(ENGINE)
    return Engine() if found is None else found


def _odd(state: Mapping[str, Any], parameter: Tensor) -> list[str]:
    """Return the names of the optimizer's non-scalar state tensors whose shape differs from the parameter's."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
    return [key for key, value in tensors.items() if value.shape != parameter.shape]


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


def _fresh(name: str, values: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Return the initial optimizer state ``name`` for new parameter entries with these ``values``."""
    if name == _AVERAGE:
        return values
    setting = _FRESH.get(name, "")
    # Rprop's first step size is the initial learning rate, which a scheduler keeps in the group. Another library's
    # optimizer may have a state of the same name without the setting.
    first = settings.get(f"initial_{setting}", settings.get(setting, 0.0))
    return torch.full_like(values, float(first))


def complete_(tuner: Tuner, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """In torch's distributed checkpoint, add initial optimizer states for parameters withheld from every step.

    Without these, `set_optimizer_state_dict` rejects the result of `get_optimizer_state_dict`. Nothing is added for
    optimizers with states that do not have their parameter's shape.
    """
    if not torch_private.in_distributed_checkpoint():
        return
    own = {id(parameter) for parameter in tuner.parameters() if parameter.requires_grad}
    states = state_dict["state"]
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        pairs = list(zip(group["params"], saved["params"], strict=True))
        like, known = next(((p, states[key]) for p, key in pairs if states.get(key)), (None, {}))
        if like is None or _odd(known, like):
            continue
        for parameter, key in pairs:
            if id(parameter) in own and not states.get(key):
                states[key] = {name: _untouched(name, value, parameter, group) for name, value in known.items()}


def _untouched(name: str, value: Any, parameter: nn.Parameter, settings: Mapping[str, Any]) -> Any:
    """Return the initial state ``name`` of ``parameter``; ``value`` is this state of another parameter."""
    if isinstance(value, Tensor) and value.ndim:
        return _fresh(name, parameter.detach().to(value.dtype, copy=True), settings)
    if name != "step":
        return value
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0
