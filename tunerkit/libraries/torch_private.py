"""The private names of torch that tunerkit relies on, each looked up when it is used and never by an import.

If a release of torch renames one, tests/test_torch_private.py names it, and this is the file to change.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint

# --- What a module holds itself --------------------------------------------------------------------------------------


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of ``module`` itself: the live dict, also while an attribute stands in front of one."""
    return module._parameters


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The direct children of ``module``: the live dict, which takes names that `add_module` refuses."""
    return module._modules


def compiled_from(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` was given, if it returned ``module``."""
    return module._modules.get("_orig_mod")


# --- Hooks -----------------------------------------------------------------------------------------------------------


def has_hook(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether ``function`` is a forward hook or a forward pre-hook of ``module``."""
    return function in module._forward_hooks.values() or function in module._forward_pre_hooks.values()


def has_single_hook(module: nn.Module) -> bool:
    """Whether one forward hook sees the output of ``module``, and no other hook does."""
    return len(module._forward_hooks) == 1 and not nn.modules.module._global_forward_hooks


def remove_hooks_(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Remove the forward hooks and pre-hooks that are one of ``functions``, or a ``partial`` of one.

    A handle would not survive a deep copy.
    """
    flags = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if (hook.func if isinstance(hook, partial) else hook) in functions:
                for table in (hooks, *flags):
                    table.pop(key, None)


# --- Kinds of modules ------------------------------------------------------------------------------------------------


def is_convolution(module: nn.Module) -> "TypeGuard[nn.modules.conv._ConvNd]":
    """Whether ``module`` is a convolution, transposed ones included."""
    return isinstance(module, nn.modules.conv._ConvNd)


def has_statistics(module: nn.Module) -> "TypeGuard[nn.modules.batchnorm._NormBase]":
    """Whether ``module`` is a batch norm or an instance norm: these may keep running statistics."""
    return isinstance(module, nn.modules.batchnorm._NormBase)


def is_batch_norm(module: nn.Module) -> "TypeGuard[nn.modules.batchnorm._BatchNorm]":
    """Whether ``module`` is a batch norm."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def channel_norms() -> tuple[type[nn.Module], ...]:
    """The classes of norms whose forwards add the bias along the channels."""
    return nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm


def is_batched(norm: nn.Module, y: Tensor) -> bool:
    """Whether the output ``y`` of ``norm`` has a batch dimension; instance norm alone works without one."""
    return not isinstance(norm, nn.modules.instancenorm._InstanceNorm) or y.dim() > norm._get_no_batch_dim()


def runs_convolution_of(module: Any, kind: Any) -> bool:
    """Whether the method in which ``module`` convolves is that of ``kind``, both convolutions."""
    return type(module)._conv_forward is kind._conv_forward and "_conv_forward" not in vars(module)


def convolve(module: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """Run the convolution of ``module`` on ``x`` with another weight and no bias."""
    return cast(Tensor, module._conv_forward(x, kernel, None))


# --- Modes -----------------------------------------------------------------------------------------------------------


def version(tensor: Tensor) -> int | None:
    """The counter that rises with every in-place change of ``tensor``; inference tensors have none."""
    return None if tensor.is_inference() else tensor._version


def is_observed() -> bool:
    """Whether something looks into the operations of a forward, or keeps their outputs.

    That is tracing, a transform of functorch, forward-mode differentiation, or selective checkpointing, which gives
    the outputs that it keeps out again in backward.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    keepers = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
    return any(isinstance(mode, keepers) for mode in _python_dispatch()._get_current_dispatch_mode_stack())


def dispatch_mode() -> Any:
    """The class whose ``__torch_dispatch__`` is called, inside a block of it, for each operation."""
    return _python_dispatch().TorchDispatchMode


def _python_dispatch() -> Any:
    return importlib.import_module("torch.utils._python_dispatch")


def multiplies_bf16_in_tiles() -> bool:
    """Whether the CPU has AMX."""
    return torch.cpu._is_amx_tile_supported()


# --- DistributedDataParallel -----------------------------------------------------------------------------------------


def running_ddp() -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running, if there is one."""
    return nn.parallel.DistributedDataParallel._active_ddp_module


def synchronised(ddp: nn.parallel.DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters that ``ddp`` was built around; those added to its module later are missing."""
    return ddp._module_parameters


# --- Lists of tensors -------------------------------------------------------------------------------------------------


def divide_(tensors: list[Tensor], divisor: Tensor) -> None:
    """Divide ``tensors``, which lie on the device of ``divisor``, in place and in one operation."""
    torch._foreach_div_(tensors, divisor)


# --- The compiler ----------------------------------------------------------------------------------------------------

_DYNAMO = "torch._dynamo"


def uncompiled(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """``function`` as code that dynamo leaves alone: it cannot trace what a plugin is asked through."""
    # Loading dynamo takes seconds, and who has not loaded it compiles nothing.
    return torch.compiler.disable(function) if _DYNAMO in sys.modules else function


def forget_compiled() -> None:
    """Let compiled code notice our hooks: drop what was compiled before, and have dynamo look at hooks from now on.

    By default it does not, so what it compiled for a model would run, without adapters, for another of the same class
    that has some. This loads dynamo, which takes seconds and which building an optimizer does too: nothing calls us
    when somebody else loads it, and code that was compiled before the setting is changed would ignore adapters.
    """
    dynamo = importlib.import_module(_DYNAMO)
    dynamo.config.skip_nnmodule_hook_guards = False
    if dynamo.convert_frame.input_codes.seen:  # nothing was compiled yet, most often
        dynamo.reset()


def compile_counter(backend: str) -> Any:
    """A backend of `torch.compile` that runs ``backend`` and counts its compilations in ``frame_count``."""
    return importlib.import_module(f"{_DYNAMO}.testing").CompileCounterWithBackend(backend)
