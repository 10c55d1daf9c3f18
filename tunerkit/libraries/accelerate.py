"""Sees past accelerate's device hooks: a module's own forward, the device it runs on, and its weights while away.

`accelerate.cpu_offload`, `dispatch_model` and ``device_map="auto"`` wrap the forward of each module on the instance.
Offloaded weights are on the meta device except inside that forward. Nothing here imports accelerate.
"""

import copy
import functools
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_HOOK = "_hf_hook"
_WRAPPED = "_old_forward"
# Those that only move tensors between devices; any other hook may change what goes in and out.
_MOVERS = frozenset({"AlignDevicesHook", "CpuOffload"})


def overrides_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward that may do something else than its class's."""
    if "forward" not in vars(module):
        return False
    own = vars(module)["forward"]
    if _is_device_wrapper(own) and all(type(hook).__name__ in _MOVERS for hook in _hooks(module)):
        own = vars(module).get(_WRAPPED)
    # Removing the hooks leaves the class's own forward on the instance, as a bound method.
    return not (isinstance(own, MethodType) and own.__self__ is module and own.__func__ is type(module).forward)


def forward_owner(module: nn.Module) -> type:
    """The class that defines the forward of ``module``; ``object`` if the instance has its own."""
    if overrides_forward(module):
        return object
    return next(owner for owner in type(module).__mro__ if "forward" in vars(owner))


def forward_name(module: nn.Module) -> str:
    """The qualified name of `forward_owner`."""
    owner = forward_owner(module)
    return f"{owner.__module__}.{owner.__qualname__}"


def execution_device(module: nn.Module) -> torch.device | None:
    """The device to which a hook brings the module and its input, or None if there is no such hook."""
    found = [hook.execution_device for hook in _aligners(module) if hook.execution_device is not None]
    return torch.device(found[-1]) if found else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's weights are brought by a hook of its own for each forward, and are away in between."""
    return _loader(module) is not None


def identity(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """What tied parameters have in common: the object, or the stored weight, since offloading breaks the objects' tie.

    Weights on a disk have no identity without being read: a tie among those is not seen.
    """
    stored = _in_memory(module, name) if parameter.is_meta else None
    return id(parameter) if stored is None else stored.data_ptr()


def duplicate(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """A deep copy whose weights stay where the module runs, whatever offloads the module's own.

    ``replaced`` gives, by the id of a part, what stands in its place in the copy.
    """
    # A hook may hold the whole model's weights, which must not be copied with it.
    hooks = {id(hook): _only_moving(hook) for part in module.modules() if (hook := vars(part).get(_HOOK)) is not None}
    twin = copy.deepcopy(module, {**replaced, **hooks})
    brought: dict[int, nn.Parameter] = {}
    for path, part in twin.named_modules():
        original = module.get_submodule(path)
        if is_offloaded(original):
            _bring(part, original, brought)
    return twin


def _is_device_wrapper(forward: object) -> bool:
    return isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks"


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks at ``module`` itself, those in a chain one by one."""
    hook = vars(module).get(_HOOK)
    if hook is None:
        return []
    return list(hook.hooks) if type(hook).__name__ == "SequentialHook" else [hook]


def _aligners(module: nn.Module) -> list[Any]:
    """The hooks at ``module`` that bring it and its input to one device; `CpuOffload` moves a whole model instead."""
    return [hook for hook in _hooks(module) if type(hook).__name__ == "AlignDevicesHook"]


def _loader(module: nn.Module) -> Any:
    """The hook that brings the module's own weights, if one does."""
    return next((hook for hook in _aligners(module) if hook.offload), None)


def _in_memory(module: nn.Module, name: str) -> Tensor | None:
    """The offloaded weight ``name`` if it lies in memory."""
    loader = _loader(module)
    if loader is None:
        return None
    kept, key = loader.weights_map, name
    while not isinstance(kept, dict):
        # Views of one mapping by prefix, and a mapping of what is in memory and what is on the disk.
        key = vars(kept).get("prefix", "") + key
        kept = vars(kept).get("dataset", vars(kept).get("state_dict", {}))
    found: Tensor | None = kept.get(key)
    return found


def _only_moving(hook: Any) -> Any:
    """``hook`` as one that brings inputs to its device and leaves the weights alone."""
    calm = copy.copy(hook)
    if type(hook).__name__ == "SequentialHook":
        calm.hooks = [_only_moving(part) for part in hook.hooks]
    elif type(hook).__name__ == "AlignDevicesHook":
        calm.offload, calm.weights_map, calm.tied_params_map = False, None, None
    return calm


def _bring(part: nn.Module, original: nn.Module, brought: dict[int, nn.Parameter]) -> None:
    """Give ``part``, a copy of ``original``, its weights; those that were tied stay so."""
    loader, device = _loader(original), execution_device(original)
    for name, parameter in original.named_parameters(recurse=False, remove_duplicate=False):
        if parameter.is_meta:
            key = identity(original, name, parameter)
            if key not in brought:
                value = loader.weights_map[name].detach().to(device, copy=True)
                brought[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            part.register_parameter(name, brought[key])
    for name, buffer in original.named_buffers(recurse=False):
        if buffer.is_meta:
            setattr(part, name, loader.weights_map[name].detach().to(device, copy=True))
