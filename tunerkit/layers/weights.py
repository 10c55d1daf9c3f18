"""The weights and forwards of modules, also where a library holds or wraps them: see `tunerkit.plugin.Holding`.

Plugins are asked about weights only where one is empty or on the meta device, so ordinary forwards cost nothing and can
be compiled.
"""

import copy
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
    """Callback that returns the plugins' holdings; set by tunerkit.hooks to avoid an import cycle."""

    holdings: Callable[[], Sequence[Holding]] = tuple


plugins = _Plugins()


# --- Offloaded weights ------------------------------------------------------------------------------------------------


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight as the module's forward uses it: the parameter itself, or its values, detached, if it is elsewhere.

    Between two forwards, an offloaded parameter is on the meta device. Products with it give uninitialized memory. One
    that is divided among processes may be empty then, and is gathered: all processes ask for it together.

    Raises:
        AdapterError: It is on the meta device, and what put it there does not load it.
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
            f"an adapter reads the {name} of a {type(module).__name__} that is on the meta device, and nothing that is "
            "installed loads it; load the model without offloading this module"
        )
    return weight


def offloading(module: nn.Module) -> Holding | None:
    """The library that offloads the module's own weights between forwards; None if they are loaded."""
    if not any(tensor.is_meta for tensor in _own(module)):
        return None
    return next((each for each in plugins.holdings() if each.offloads(module)), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which the module runs, to which its weights may be loaded first; None if it is unknown."""
    own = _own(module)
    if not own or any(tensor.is_meta for tensor in own):
        for each in plugins.holdings():
            if (device := each.device(module)) is not None:
                return device
    return next((tensor.device for tensor in own if not tensor.is_meta), None)


def _own(module: nn.Module) -> list[Tensor]:
    return [*parameters_of(module).values(), *module.buffers(recurse=False)]


def identity(module: nn.Module, name: str, tensor: Tensor) -> int:
    """A number that tied parameters share, also where offloading gave each of two modules its own object."""
    for each in plugins.holdings() if tensor.is_meta else ():
        if (found := each.identity(module, name, tensor)) is not None:
            return found
    return id(tensor)


def duplicate(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """A deep copy whose weights stay on the device that the module runs on, even if its own are offloaded.

    ``replaced`` maps the id of a submodule to the module that takes its place in the copy.
    """
    for each in plugins.holdings():
        if (twin := each.duplicate(module, replaced)) is not None:
            return twin
    return copy.deepcopy(module, {**replaced})


def lender(module: nn.Module) -> Holding | None:
    """The library that currently discards in-place writes to the module's weights; None if they persist."""
    return next((each for each in plugins.holdings() if each.lent(module) is not None), None)


# --- Sharded weights --------------------------------------------------------------------------------------------------


def sharding(tensors: Iterable[Tensor]) -> Holding | None:
    """The library that shards one of the tensors, also while it is gathered; None if all are whole."""
    holdings = plugins.holdings()
    return next((each for tensor in tensors for each in holdings if each.shards(tensor)), None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor, also while it is gathered."""
    return sharding([tensor]) is not None


def emptied(tensors: Iterable[Tensor]) -> Holding | None:
    """The library that shards one of the tensors and has left it empty; None if all have values."""
    empty = [tensor for tensor in tensors if not tensor.numel()]
    return sharding(empty) if empty else None


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor, which may be empty between its uses."""
    holding = None if tensor.numel() else sharding([tensor])
    return tensor.shape if holding is None else torch.Size(holding.shape(tensor))


def part_of(tensor: Tensor) -> Tensor | None:
    """The shard of a tensor in this process, as a view of its memory; None if it is whole."""
    holding = sharding([tensor])
    return None if holding is None else holding.part(tensor)


def gathered(module: nn.Module) -> AbstractContextManager[Callable[[str, Tensor], Tensor]]:
    """Inside the block, the parameters of the module and below it are whole. See `Holding`."""
    holding = sharding(module.parameters())
    return nullcontext(lambda name, tensor: tensor) if holding is None else holding.gathered(module)


def reshard_(model: nn.Module) -> None:
    """Shard again the weights of ``model`` that a forward has left whole."""
    for each in plugins.holdings():
        each.reshard_(model)


@contextmanager
def new_modules_whole() -> Iterator[None]:
    """Inside the block, new modules are whole, and on the CPU, whatever library or default device would have them."""
    with ExitStack() as entered:
        if torch.get_default_device().type != "cpu":  # else it would only cost time, in every call of torch
            entered.enter_context(torch.device("cpu"))
        for each in plugins.holdings():
            entered.enter_context(each.outside())
        yield


# --- Forwards, and classes by qualified name: no other library is imported --------------------------------------------


def forward_owner(module: nn.Module) -> type:
    """The class that defines the forward of ``module``; ``object`` if the instance has one that may differ."""
    if (own := vars(module).get("forward")) is not None:
        for each in plugins.holdings():  # a library's forward may only load weights around the one inside
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
    """The qualified name of `forward_owner`."""
    owner = forward_owner(module)
    return f"{owner.__module__}.{owner.__qualname__}"


def code_owner(module: nn.Module) -> str:
    """The qualified name of the class in whose body the code of the forward stands, also if the class got it later."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return ""
    return f"{forward.__globals__.get('__name__', '')}.{forward.__code__.co_qualname.rpartition('.')[0]}"


def is_named(kind: type, name: str) -> bool:
    """Whether ``kind`` is the class with this qualified name, or one in the package ``name.``, or derives from one."""
    own = [f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__]
    return name in own or (name.endswith(".") and any(each.startswith(name) for each in own))


def is_listed(name: str, listed: tuple[str, ...]) -> bool:
    """Whether a qualified name is one of ``listed``, or in one of its packages, which end with a dot."""
    if name in listed or not name.startswith(listed):  # nearly always
        return name in listed
    return any(each.endswith(".") and name.startswith(each) for each in listed)
