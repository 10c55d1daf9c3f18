"""accelerate's device hooks: the forward that they wrap, a module's execution device, and its offloaded weights.

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
from tunerkit_distributed.torch_private import own_parameters

_HOOK = "_hf_hook"
_WRAPPED = "_old_forward"
# These only move tensors between devices. Any other hook may change the input or the output.
_MOVERS = frozenset({"AlignDevicesHook", "CpuOffload"})


def forward_on_instance(module: nn.Module) -> object | None:
    """Return the instance-level forward wrapped by hooks that only move tensors; None without hooks or with others."""
    own = vars(module).get("forward")
    wrapped = isinstance(own, functools.partial) and own.func.__module__ == "accelerate.hooks"
    if wrapped and all(type(hook).__name__ in _MOVERS for hook in _hooks(module)):
        found: object = vars(module).get(_WRAPPED, own)
        return found
    return None


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device to which a hook moves the module and its input; None if there is no such hook."""
    found = [hook.execution_device for hook in _aligners(module) if hook.execution_device is not None]
    return torch.device(found[-1]) if found else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are offloaded: a hook loads them for each forward and removes them after it."""
    return _loader(module) is not None


def load(module: nn.Module, name: str) -> Tensor:
    """Return the values of an offloaded weight or buffer, detached, on the module's execution device.

    Raises:
        AdapterError: No hook of the module loads the weight.
    """
    if (loader := _loader(module)) is None:
        raise AdapterError(
            f"an adapter reads the {name} of a {type(module).__name__} that is on the meta device, and "
            f"{type(_hooks(module)[-1]).__name__} does not load it; load the model without offloading this module"
        )
    loaded: Tensor = loader.weights_map[name].detach()
    return loaded.to(execution_device(module))


def identity(module: nn.Module, name: str, tensor: Tensor) -> int | None:
    """Return the address of an offloaded weight's stored values, equal for tied parameters; None if not offloaded.

    The address is needed because offloading gives tied parameters separate objects. Ties on disk are not detected.
    """
    if (loader := _loader(module)) is None:
        return None
    kept, key = loader.weights_map, name
    while not isinstance(kept, dict):
        # A view of another mapping by prefix, or a mapping that combines weights in memory with those on disk.
        key = vars(kept).get("prefix", "") + key
        kept = vars(kept).get("dataset", vars(kept).get("state_dict", {}))
    stored: Tensor | None = kept.get(key)
    return None if stored is None else stored.data_ptr()


def duplicate(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module | None:
    """Return a deep copy with its weights on the execution device; None if no part of the module has a hook.

    ``replaced`` maps the id of a submodule to its replacement in the copy.
    """
    # A hook may hold the weights of the whole model. They must not be copied with it.
    hooks = {id(hook): _only_moving(hook) for part in module.modules() for hook in _hooks(part)}
    if not hooks:
        return None
    twin = copy.deepcopy(module, {**replaced, **hooks})
    loaded: dict[int, nn.Parameter] = {}
    for path, part in twin.named_modules():
        _load_(part, module.get_submodule(path), loaded)
    return twin


def _hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of ``module`` itself, with those in a chain listed singly."""
    hook = vars(module).get(_HOOK)
    if hook is None:
        return []
    return list(hook.hooks) if type(hook).__name__ == "SequentialHook" else [hook]


def _aligners(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks that move this module and its input to one device, without those for whole models."""
    return [hook for hook in _hooks(module) if type(hook).__name__ == "AlignDevicesHook"]


def _loader(module: nn.Module) -> Any:
    """Return the hook that loads the module's own weights; None if they are not offloaded."""
    return next((hook for hook in _aligners(module) if hook.offload), None)


def _only_moving(hook: Any) -> Any:
    """Return a copy of ``hook`` that moves inputs, but does not load or offload weights."""
    calm = copy.copy(hook)
    if type(hook).__name__ == "AlignDevicesHook":
        calm.offload, calm.weights_map, calm.tied_params_map = False, None, None
    return calm


def _load_(part: nn.Module, original: nn.Module, loaded: dict[int, nn.Parameter]) -> None:
    """Load the offloaded weights of ``original`` into ``part``, its copy. Tied parameters stay tied."""
    if (loader := _loader(original)) is None:
        return

    def copied(name: str) -> Tensor:
        value: Tensor = loader.weights_map[name].detach()
        return value.to(execution_device(original), copy=True)

    for name, parameter in own_parameters(original).items():
        if parameter is not None and parameter.is_meta:
            key = identity(original, name, parameter) or id(parameter)
            if key not in loaded:
                loaded[key] = nn.Parameter(copied(name), requires_grad=parameter.requires_grad)
            setattr(part, name, loaded[key])
    # Each buffer by itself: two that are views of one storage may differ in shape.
    for name, buffer in original.named_buffers(recurse=False, remove_duplicate=False):
        if buffer.is_meta:
            setattr(part, name, copied(name))
