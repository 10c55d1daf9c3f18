"""accelerate's device hooks: the forward behind them, the device that a module runs on, and its offloaded weights.

`accelerate.cpu_offload`, `dispatch_model` and ``device_map="auto"`` wrap the forward of each module on the instance.
Offloaded weights are on the meta device except inside that forward. Nothing here imports accelerate.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.libraries.torch_private import own_parameters
from tunerkit.libraries.zero_init import whole_value

_HOOK = "_hf_hook"
_WRAPPED = "_old_forward"
# These only move tensors between devices. Any other hook may change the input or the output.
_MOVERS = frozenset({"AlignDevicesHook", "CpuOffload"})


def forward_on_instance(module: nn.Module) -> object | None:
    """The forward that is set on the instance, without hooks that only move tensors; None if the class's is used."""
    own = vars(module).get("forward")
    wrapped = isinstance(own, functools.partial) and own.func.__module__ == "accelerate.hooks"
    if wrapped and all(type(hook).__name__ in _MOVERS for hook in _hooks(module)):
        return vars(module).get(_WRAPPED, own)
    return own


def execution_device(module: nn.Module) -> torch.device | None:
    """The device to which a hook moves the module and its input; None if there is no such hook."""
    found = [hook.execution_device for hook in _aligners(module) if hook.execution_device is not None]
    return torch.device(found[-1]) if found else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are offloaded: a hook loads them for each forward and removes them after it."""
    return _loader(module) is not None


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight as the module's forward uses it: the parameter itself, or the loaded values if it is offloaded.

    Between two forwards, an offloaded parameter is on the meta device. Products with it give uninitialised memory. One
    that DeepSpeed has partitioned is empty then, and is gathered: all processes ask for it together.

    Raises:
        AdapterError: It is on the meta device, and the hook there is none that loads it.
    """
    weight: Tensor = getattr(module, name)
    if not weight.is_meta or not _hooks(module):  # without hooks, the module itself computes on the meta device
        return weight if torch.compiler.is_compiling() else whole_value(weight)
    if (loader := _loader(module)) is None:
        raise AdapterError(
            f"an adapter reads the {name} of a {type(module).__name__} that is on the meta device, and "
            f"{type(_hooks(module)[-1]).__name__} does not load it; load the model without offloading this module"
        )
    loaded: Tensor = loader.weights_map[name].detach()
    return loaded.to(execution_device(module))


def identity(module: nn.Module, name: str, tensor: Tensor) -> int:
    """A number that tied parameters share: the object's id, or the address of the offloaded weight.

    Offloading gives each of two tied modules its own object. Weights on disk would have to be read, so a tie among
    those is not found.
    """
    loader = _loader(module) if tensor.is_meta else None
    if loader is None:
        return id(tensor)
    kept, key = loader.weights_map, name
    while not isinstance(kept, dict):
        # A view of another mapping by prefix, or a mapping that combines weights in memory with those on disk.
        key = vars(kept).get("prefix", "") + key
        kept = vars(kept).get("dataset", vars(kept).get("state_dict", {}))
    stored: Tensor | None = kept.get(key)
    return id(tensor) if stored is None else stored.data_ptr()


def duplicate(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """A deep copy whose weights stay on the device that the module runs on, even if its own are offloaded.

    ``replaced`` maps the id of a submodule to the module that takes its place in the copy.
    """
    # A hook may hold the weights of the whole model. They must not be copied with it.
    hooks = {id(hook): _only_moving(hook) for part in module.modules() for hook in _hooks(part)}
    twin = copy.deepcopy(module, {**replaced, **hooks})
    loaded: dict[int, nn.Parameter] = {}
    for path, part in twin.named_modules():
        _load_(part, module.get_submodule(path), loaded)
    return twin


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of ``module`` itself; a chain's hooks one by one."""
    hook = vars(module).get(_HOOK)
    if hook is None:
        return []
    return list(hook.hooks) if type(hook).__name__ == "SequentialHook" else [hook]


def _aligners(module: nn.Module) -> list[Any]:
    """The hooks that move ``module`` and its input to one device; `CpuOffload` moves a whole model instead."""
    return [hook for hook in _hooks(module) if type(hook).__name__ == "AlignDevicesHook"]


def _loader(module: nn.Module) -> Any:
    """The hook that loads the module's own weights; None if they are not offloaded."""
    return next((hook for hook in _aligners(module) if hook.offload), None)


def _only_moving(hook: Any) -> Any:
    """A copy of ``hook`` that still moves inputs but loads and offloads no weights."""
    calm = copy.copy(hook)
    if type(hook).__name__ == "AlignDevicesHook":
        calm.offload, calm.weights_map, calm.tied_params_map = False, None, None
    return calm


def _load_(part: nn.Module, original: nn.Module, loaded: dict[int, nn.Parameter]) -> None:
    """Load the offloaded weights of ``original`` into ``part``, its copy. Tied parameters stay tied."""
    if (loader := _loader(original)) is None:
        return

    def load(name: str) -> Tensor:
        value: Tensor = loader.weights_map[name].detach()
        return value.to(execution_device(original), copy=True)

    for name, parameter in own_parameters(original).items():
        if parameter is not None and parameter.is_meta:
            key = identity(original, name, parameter)
            if key not in loaded:
                loaded[key] = nn.Parameter(load(name), requires_grad=parameter.requires_grad)
            setattr(part, name, loaded[key])
    # Each buffer by itself: two that are views of one storage may differ in shape.
    for name, buffer in original.named_buffers(recurse=False, remove_duplicate=False):
        if buffer.is_meta:
            setattr(part, name, load(name))
