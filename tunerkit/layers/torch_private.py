"""The private names of torch that tunerkit relies on. Each is looked up at use, never by an import.

If a release of torch renames one, tests/layers/test_torch_private.py reports its name, and this is the file to change.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, FrameType
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn, overrides
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._device import DeviceContext

H = TypeVar("H", bound=nn.Module)

# --- A module's own parameters and children --------------------------------------------------------------------------


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the live dict of the module's own parameters, including any hidden by an attribute of the same name."""
    return module._parameters


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's own parameters by name, even if the module overrides `named_parameters`."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the live dict of the module's children, which accepts names that `add_module` rejects."""
    return module._modules


def modules_outside(model: nn.Module, hidden: type[H], key: str) -> list[tuple[str, nn.Module, H | None]]:
    """Return (path, module, child) for each module once; the child has name ``key`` and class ``hidden``, or is None.

    Modules of class ``hidden``, and all modules inside them, are left out.
    """
    found: dict[int, tuple[str, nn.Module, H | None]] = {}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) not in found:
            own = None
            # In reverse, since the last entry of the list is visited first.
            for name, child in reversed(module._modules.items()):
                if isinstance(child, hidden):
                    own = child if name == key else own
                elif child is not None:
                    waiting.append((f"{path}.{name}" if path else name, child))
            found[id(module)] = path, module, own
    return [*found.values()]


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return the module from which `torch.compile` made ``module``; None if ``module`` is not compiled."""
    return module._modules.get("_orig_mod")


# --- Tensors made of other tensors, as quantization libraries build them ----------------------------------------------


def is_packed(weight: object) -> bool:
    """Whether a weight is a tensor subclass made of other tensors, such as integers and scales; False for a DTensor."""
    kind = type(weight)
    if kind in (nn.Parameter, Tensor):
        return False
    names = (f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__)
    # A DTensor can be flattened too, but its values are plain numbers.
    return hasattr(kind, "__tensor_flatten__") and "torch.distributed.tensor.DTensor" not in names


def numbers_of(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors of which a packed weight consists; for a plain tensor, only itself."""
    if not is_packed(tensor):
        return [tensor]
    names, _ = cast(Any, tensor).__tensor_flatten__()
    return [inner for name in names for inner in numbers_of(getattr(tensor, name))]


# --- Hooks -----------------------------------------------------------------------------------------------------------


def has_hook(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether ``function`` is a forward hook or a forward pre-hook of ``module``."""
    return function in module._forward_hooks.values() or function in module._forward_pre_hooks.values()


def has_single_hook(module: nn.Module) -> bool:
    """Whether exactly one forward hook sees the output of ``module``, counting global hooks."""
    return len(module._forward_hooks) == 1 and not nn.modules.module._global_forward_hooks


def remove_hooks_(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Remove the forward hooks and pre-hooks that are one of ``functions``, or a ``partial`` of one.

    Hooks are found by function because a handle does not survive a deep copy.
    """
    flags = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if (hook.func if isinstance(hook, partial) else hook) in functions:
                for table in (*flags, hooks):  # the hook last, so that an interrupted call can be repeated
                    table.pop(key, None)


def hooks_before(module: nn.Module, function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the forward hooks of ``module`` that run before ``function``; empty if ``function`` is not among them."""
    hooks = [*module._forward_hooks.values()]
    return hooks[: hooks.index(function)] if function in hooks else []


def mute_hooks_(module: nn.Module) -> None:
    """Change the hooks of ``module``, a copy, so that a forward hook of the original can call the copy.

    Forward hooks are removed, since the original's run too. Pre-hooks stay, since some compute a weight from other
    parameters; but their results are ignored, since the original's pre-hooks have changed the arguments already.
    """
    for key in list(module._forward_hooks):
        for table in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called, module._forward_hooks):
            table.pop(key, None)
    for key, hook in module._forward_pre_hooks.items():
        module._forward_pre_hooks[key] = partial(_without_result, hook)


def _without_result(hook: Callable[..., Any], *call: Any) -> None:
    hook(*call)


def remove_state_hooks_(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Remove the hooks after ``state_dict()`` and before ``load_state_dict()`` that are one of ``functions``."""
    after: dict[int, Any] = module._state_dict_hooks
    before: dict[int, Any] = module._load_state_dict_pre_hooks
    for key in [key for key, hook in after.items() if hook in functions]:
        del after[key]
    for key in [key for key, wrapper in before.items() if wrapper.hook in functions]:
        del before[key]


# --- Calls and kinds of modules ---------------------------------------------------------------------------------------


def called_in(frame: FrameType) -> Iterator[nn.Module]:
    """Yield the modules that are being called in the stack of ``frame``, the innermost first."""
    call: Any = nn.Module._wrapped_call_impl  # a library may have replaced `__call__`
    for each, _ in traceback.walk_stack(frame):
        # A frame of another thread that has finished has no variables any more.
        if each.f_code is call.__code__ and (module := each.f_locals.get("self")) is not None:
            yield module


def is_convolution(module: nn.Module) -> "TypeGuard[nn.modules.conv._ConvNd]":
    """Whether ``module`` is a convolution, including transposed ones."""
    return isinstance(module, nn.modules.conv._ConvNd)


def has_statistics(module: nn.Module) -> "TypeGuard[nn.modules.batchnorm._NormBase]":
    """Whether ``module`` is a batch norm or an instance norm, which may have running statistics."""
    return isinstance(module, nn.modules.batchnorm._NormBase)


def is_batch_norm(module: nn.Module) -> "TypeGuard[nn.modules.batchnorm._BatchNorm]":
    """Whether ``module`` is a batch norm."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def channel_norms() -> tuple[type[nn.Module], ...]:
    """Return the classes of norms whose forward adds the bias along the channel dimension."""
    return nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm


def is_batched(norm: nn.Module, y: Tensor) -> bool:
    """Whether the output ``y`` of ``norm`` has a batch dimension; only instance norm works without one."""
    return not isinstance(norm, nn.modules.instancenorm._InstanceNorm) or y.dim() > norm._get_no_batch_dim()


def runs_convolution_of(module: Any, kind: Any) -> bool:
    """Whether the convolution ``module`` uses the ``_conv_forward`` of class ``kind``."""
    return type(module)._conv_forward is kind._conv_forward and "_conv_forward" not in vars(module)


def convolve(module: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """Run the convolution of ``module`` on ``x`` with ``kernel`` as the weight and no bias."""
    return cast(Tensor, module._conv_forward(x, kernel, None))


# --- Modes -----------------------------------------------------------------------------------------------------------


def version(tensor: Tensor) -> int | None:
    """Return the counter that in-place changes of ``tensor`` increment; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version


def versions(module: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Return (id, version counter) of the module's tensors by name, to detect replaced and changed tensors."""
    own = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return {name: (id(t), None if t.is_inference() else t._version) for name, t in own.items()}


def is_intercepted() -> bool:
    """Whether ``F.linear`` was replaced, or is intercepted by a torch function mode other than a default device."""
    modes = overrides._get_current_function_mode_stack()
    return not isinstance(F.linear, BuiltinFunctionType) or any(type(mode) is not DeviceContext for mode in modes)


def is_observed() -> bool:
    """Whether the operations of a forward are recorded or their outputs stored, which forbids in-place changes.

    This is so during tracing, export, a functorch transform, forward-mode differentiation and selective checkpointing,
    which returns the stored outputs again in backward.
    """
    if is_transformed_or_exported() or forward_ad._current_level >= 0 or torch._C._is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    keepers = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    return any(isinstance(mode, keepers) for mode in _python_dispatch()._get_current_dispatch_mode_stack())


def is_transformed_or_exported() -> bool:
    """Whether a transform of ``torch.func`` or an export is active. Dynamo can trace this check, even in torch 2.9."""
    return torch.compiler._is_exporting_flag or torch._C._are_functorch_transforms_active()


def dispatch_mode() -> Any:
    """Return the base class of dispatch modes; inside one, each operation calls the mode's ``__torch_dispatch__``."""
    return _python_dispatch().TorchDispatchMode


def _python_dispatch() -> Any:
    return importlib.import_module("torch.utils._python_dispatch")


# --- Products ---------------------------------------------------------------------------------------------------------


def onednn_product() -> Any:
    """Return the operation that computes X Wᵀ with oneDNN; None if oneDNN is off.

    Also None inside a dispatch mode, such as a counter of FLOPs, which would not recognize the operation.
    """
    if not cast(bool, torch.backends.mkldnn.enabled) or torch._C._len_torch_dispatch_stack():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise
    except AttributeError:  # a torch without oneDNN
        return None


# --- Distributed checkpoint -------------------------------------------------------------------------------------------

_STATE_DICT = "torch.distributed.checkpoint.state_dict"


def in_distributed_checkpoint() -> bool:
    """Whether functions of ``torch.distributed.checkpoint.state_dict`` are running, such as `get_state_dict`.

    For an optimizer without state, these functions set all gradients and learning rates to 0 and call ``step``. An
    ordinary step may have zeros too, so the call stack is searched.
    """
    frame = inspect.currentframe() if _STATE_DICT in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == _STATE_DICT:
            return True
        frame = frame.f_back
    return False


# --- Lists of tensors -------------------------------------------------------------------------------------------------


def divide_(tensors: list[Tensor], divisor: Tensor) -> None:
    """Divide ``tensors`` in place, in one operation. All are on the device of ``divisor``."""
    torch._foreach_div_(tensors, divisor)


# --- The compiler ----------------------------------------------------------------------------------------------------

_DYNAMO = "torch._dynamo"


def uncompiled(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Return a form of ``function`` that dynamo does not trace, since dynamo cannot trace the calls of hooks."""
    # Loading dynamo takes seconds. Where it is not loaded, nothing is compiled.
    return torch.compiler.disable(function) if _DYNAMO in sys.modules else function


def forget_compiled() -> None:
    """Make compiled code respect hooks and shapes: discard earlier compiled code, and let dynamo guard on both.

    By default, dynamo does not guard on hooks: code compiled for a bare model would also run, without adapters, for a
    wrapped model of the same class. Before torch 2.12, code compiled for one rank would also run after the rank changed
    in place. Dynamo takes seconds to load, but cannot be left out if it is not loaded yet: building an optimizer loads
    it unnoticed, and code compiled before these settings change would ignore adapters.
    """
    dynamo = importlib.import_module(_DYNAMO)
    dynamo.config.skip_nnmodule_hook_guards = False
    if torch.__version__ < "2.12":
        dynamo.config.skip_tensor_guards_with_matching_dict_tags = False
    if dynamo.convert_frame.input_codes.seen:  # usually empty: nothing was compiled yet
        dynamo.reset()


def compile_counter(backend: str) -> Any:
    """Return a backend of `torch.compile` that runs ``backend`` and counts compilations in ``frame_count``."""
    return importlib.import_module(f"{_DYNAMO}.testing").CompileCounterWithBackend(backend)
