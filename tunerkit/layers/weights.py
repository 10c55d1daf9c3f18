"""Read modules' weights and forwards, even if a library offloads, shards or wraps them (`tunerkit.plugin.Holding`).

Plugins are called only for a weight that is empty or on the meta device, so ordinary forwards cost nothing and can be
compiled.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FunctionType, MethodType

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.layers.torch_private import parameters_of
from tunerkit.records import Holding


@attrs.define(eq=False)
class _Plugins:
    """The callback that returns the plugins' holdings. tunerkit.hooks sets it, which avoids an import cycle."""

    holdings: Callable[[], Sequence[Holding]] = tuple


plugins = _Plugins()


# --- Offloaded weights ------------------------------------------------------------------------------------------------


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a module's weight: the parameter itself, or its detached values if it is offloaded or partitioned.

    Between two forwards, an offloaded parameter is on the meta device, where products give uninitialized memory. A
    partitioned parameter may be empty, and is gathered: all processes must call this together.

    Raises:
        AdapterError: The weight is on the meta device, and no plugin can load it.
    """
    weight: Tensor = getattr(module, name)
    if not weight.is_meta and (weight.numel() or torch.compiler.is_compiling()):
        return weight
    if emptied([weight]) is not None:
        with gathered(some := nn.ParameterList([weight])):
            whole: Tensor = some[0].detach().clone()
            return whole
    for each in plugins.holdings() if weight.is_meta else ():
        if each.offloads(module) or each.device(module) is not None:
            return each.load(module, name)
    if weight.is_meta and "forward" in vars(module):  # else the module itself computes on the meta device
        raise AdapterError(
            f"an adapter reads the {name} of a {type(module).__name__} that is on the meta device, and no installed "
            "plugin can load it; load the model without offloading this module"
        )
    return weight


def offloading(module: nn.Module) -> Holding | None:
    """Return the holding of the library that offloads the module's own weights; None if they are loaded."""
    if not any(tensor.is_meta for tensor in _own(module)):
        return None
    return next((each for each in plugins.holdings() if each.offloads(module)), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which the module runs, even if its weights are offloaded; None if unknown."""
    own = _own(module)
    if not own or any(tensor.is_meta for tensor in own):
        for each in plugins.holdings():
            if (device := each.device(module)) is not None:
                return device
    return next((tensor.device for tensor in (*own, *module.parameters()) if not tensor.is_meta), None)


def _own(module: nn.Module) -> list[Tensor]:
    return [*parameters_of(module).values(), *module.buffers(recurse=False)]


def identity(module: nn.Module, name: str, tensor: Tensor) -> int:
    """Return a number that is equal for tied parameters, even if offloading replaced them by separate objects."""
    for each in plugins.holdings() if tensor.is_meta else ():
        if (found := each.identity(module, name, tensor)) is not None:
            return found
    return id(tensor)


def duplicate(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """Return a deep copy of a module, with loaded weights even if the module's own are offloaded.

    ``replaced`` maps the id of a submodule to its replacement in the copy.
    """
    for each in plugins.holdings():
        if (twin := each.duplicate(module, replaced)) is not None:
            return twin
    return copy.deepcopy(module, {**replaced})


def lender(module: nn.Module) -> Holding | None:
    """Return the holding of a library that currently discards in-place writes to the module's weights, else None."""
    return next((each for each in plugins.holdings() if each.lent(module) is not None), None)


# --- Sharded weights --------------------------------------------------------------------------------------------------


def sharding(tensors: Iterable[Tensor]) -> Holding | None:
    """Return the holding of the library that shards one of the tensors, even while gathered; None if there is none."""
    holdings = plugins.holdings()
    return next((each for tensor in tensors for each in holdings if each.shards(tensor)), None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded, even while it is gathered."""
    return sharding([tensor]) is not None


def emptied(tensors: Iterable[Tensor]) -> Holding | None:
    """Return the holding of the library that sharded and emptied one of the tensors; None if there is none."""
    empty = [tensor for tensor in tensors if not tensor.numel()]
    return sharding(empty) if empty else None


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the full shape of a tensor, even if it is partitioned and empty now."""
    holding = None if tensor.numel() else sharding([tensor])
    return tensor.shape if holding is None else torch.Size(holding.shape(tensor))


def part_of(tensor: Tensor) -> Tensor | None:
    """Return this process's shard of a tensor, as a view; None if the tensor is not sharded."""
    holding = sharding([tensor])
    return None if holding is None else holding.part(tensor)


def gathered(module: nn.Module) -> AbstractContextManager[Callable[[str, Tensor], Tensor]]:
    """Return a context manager in which all parameters of a module and its children are gathered: see `Holding`."""
    holding = sharding(module.parameters())
    return nullcontext(lambda name, tensor: tensor) if holding is None else holding.gathered(module)


def reshard_(model: nn.Module) -> None:
    """Reshard the weights that a forward of ``model`` has left gathered."""
    for each in plugins.holdings():
        each.reshard_(model)


def in_group() -> bool:
    """Whether this process belongs to a process group, even one with a single process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def may_be_sharded_later() -> bool:
    """Whether a process group exists, or a launcher has set ``WORLD_SIZE``, so that a group will exist."""
    return in_group() or "WORLD_SIZE" in os.environ


@contextmanager
def new_modules_whole() -> Iterator[None]:
    """Inside the block, new modules are on the CPU and not sharded, even if a default device or library differs."""
    with ExitStack() as entered:
        if torch.get_default_device().type != "cpu":  # a device context slows every call of torch
            entered.enter_context(torch.device("cpu"))
        for each in plugins.holdings():
            entered.enter_context(each.outside())
        yield


# --- Forwards, and classes by qualified name: no other library is imported --------------------------------------------


def forward_owner(module: nn.Module) -> type:
    """Return the class that defines the forward of ``module``; ``object`` if the instance overrides forward."""
    if (own := vars(module).get("forward")) is not None:
        for each in plugins.holdings():  # a library's wrapper may only load weights around the inner forward
            if (inside := each.forward(module)) is not None:
                own = inside
        # Removing a library's hooks may leave the class's forward on the instance, as a bound method.
        if own != MethodType(type(module).forward, module):
            return object
    for owner in type(module).__mro__:
        if "forward" in vars(owner):
            return owner
    return nn.Module


def forward_name(module: nn.Module) -> str:
    """Return the qualified name of the class that defines the forward of ``module``, see `forward_owner`."""
    owner = forward_owner(module)
    return f"{owner.__module__}.{owner.__qualname__}"


def code_owner(module: nn.Module) -> str:
    """Return the qualified name of the class whose code defines the forward, even if another class reuses this code."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return ""
    return f"{forward.__globals__.get('__name__', '')}.{forward.__code__.co_qualname.rpartition('.')[0]}"


def is_named(kind: type, name: str) -> bool:
    """Whether ``kind`` or a base class has the qualified name, or is in the package if ``name`` ends with a dot."""
    own = [f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__]
    return name in own or (name.endswith(".") and any(each.startswith(name) for each in own))


def is_listed(name: str, listed: tuple[str, ...]) -> bool:
    """Whether a qualified name is one of ``listed``, or in one of its packages, which end with a dot."""
    if name in listed or not name.startswith(listed):  # nearly always
        return name in listed
    return any(each.endswith(".") and name.startswith(each) for each in listed)
