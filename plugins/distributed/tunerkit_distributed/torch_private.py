"""The private names of torch that engines rely on. Each is looked up at use, never by an import.

If a release of torch renames one, the tests beside this report its name, and this is the file to change.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# --- Modules and tensors ---------------------------------------------------------------------------------------------


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of ``module`` itself, as the live dict."""
    return module._parameters


def remove_hook_(module: nn.Module, function: Callable[..., Any]) -> None:
    """Remove a forward pre-hook by its function, since handles of hooks do not survive a deep copy."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is function:
            del module._forward_pre_hooks[key]


def uncompiled(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Return ``function`` such that dynamo does not trace it; unchanged if dynamo, slow to import, is not loaded."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy ``sources`` into ``targets``, in one operation for tensors of one device and dtype."""
    torch._foreach_copy_(targets, sources)


def divide_(tensors: list[Tensor], divisor: Tensor) -> None:
    """Divide ``tensors`` in place, in one operation. All are on the device of ``divisor``."""
    torch._foreach_div_(tensors, divisor)


# --- DistributedDataParallel -----------------------------------------------------------------------------------------


def running_ddp() -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running; None outside of one."""
    return nn.parallel.DistributedDataParallel._active_ddp_module


def known_to(ddp: nn.parallel.DistributedDataParallel) -> list[nn.Parameter]:
    """Return the parameters that ``ddp`` synchronizes, now or delayed, or ignores on request."""
    ignored = [p for name, p in ddp.module.named_parameters() if name in ddp.parameters_to_ignore]
    return [*ddp._module_parameters, *ignored]


def ddp_around(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Return the first DistributedDataParallel that contains ``model``, or None."""
    return next(iter(ddps_around([model])), None)


def ddps_around(models: Collection[nn.Module]) -> list[nn.parallel.DistributedDataParallel]:
    """Return each DistributedDataParallel that contains one of ``models``; searches all objects of the process."""
    found = _ddps_around(models)
    if len(found) > 1:
        del found  # the others may be garbage, which each rank frees at another time
        gc.collect()
        found = _ddps_around(models)
    return found


def _ddps_around(models: Collection[nn.Module]) -> list[nn.parallel.DistributedDataParallel]:
    wanted, kind = set(map(id, models)), nn.parallel.DistributedDataParallel
    around = [each for each in gc.get_objects() if issubclass(type(each), kind)]
    return [each for each in around if not wanted.isdisjoint(map(id, each.modules()))]


def is_joining(ddp: nn.parallel.DistributedDataParallel) -> bool:
    """Whether ``ddp`` is or was in a ``join`` block, in which ranks may run out of data at different steps."""
    return bool(ddp._join_config.enable)


# --- Rebuilding a DistributedDataParallel ----------------------------------------------------------------------------

_OF_DDP = ("_remove_autograd_hooks", "_get_ddp_logging_data", "_has_rebuilt_buckets", "_comm_hooks", "_join_config")
_OF_REDUCER = ("_get_zeros_like_grad_buckets",)


def missing_for_rebuilding(ddp: nn.parallel.DistributedDataParallel) -> list[str]:
    """Return the private names that `rebuild_reducer_` needs and this release of torch lacks."""
    own = [name for name in _OF_DDP if not hasattr(ddp, name)]
    return own + [name for name in _OF_REDUCER if not hasattr(ddp.reducer, name)]


def special_way_of_reducing(ddp: nn.parallel.DistributedDataParallel) -> str | None:
    """Describe a feature of ``ddp`` that a new reducer would not support; None if there is none."""
    if getattr(ddp, "_use_python_reducer", False):
        return "compiled autograd averages instead of its reducer"
    if getattr(ddp, "_delay_all_reduce_params", None):
        return "it has parameters with a delayed all-reduce"
    if is_joining(ddp):
        return "it has been in a Join block, in which processes stop at different steps"
    own, name = ddp._comm_hooks, ddp._get_ddp_logging_data().get("comm_hook")
    if (own or name) and not (own and all(hook in _stateless() for hook, _ in own)):
        return f"it has the communication hook {name}, which may know its buckets"
    return None


def _stateless() -> tuple[Callable[..., Any], ...]:
    """Return torch's communication hooks without state, which a new reducer can use."""
    known = importlib.import_module("torch.distributed.algorithms.ddp_comm_hooks.default_hooks")
    return known.allreduce_hook, known.fp16_compress_hook, known.bf16_compress_hook


def parameters_of(ddp: nn.parallel.DistributedDataParallel) -> list[nn.Parameter]:
    """Return the parameters of the model when ``ddp`` was built, including frozen ones."""
    return ddp._module_parameters


def averaged_by(ddp: nn.parallel.DistributedDataParallel) -> Sequence[Tensor]:
    """Return the parameters whose gradients ``ddp`` averages: those with ``requires_grad`` when it was built.

    If other parameters are trained now, or shapes have changed, this temporarily allocates a copy of all buckets.
    """
    trained: list[Tensor] = [parameter for parameter in ddp._module_parameters if parameter.requires_grad]
    if is_built_for(ddp, trained):
        return trained
    return [p for bucket in ddp.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()]


def is_built_for(ddp: nn.parallel.DistributedDataParallel, parameters: Iterable[Tensor]) -> bool:
    """Whether the reducer of ``ddp`` was built for the total bytes of these parameters, or logs no size."""
    logged = ddp._get_ddp_logging_data() if getattr(ddp, "logger", None) is not None else {}
    built = logged.get("total_parameter_size_bytes")
    return built in (None, sum(parameter.numel() * parameter.itemsize for parameter in parameters))


def rebuild_reducer_(ddp: nn.parallel.DistributedDataParallel, averaged: Iterable[Tensor]) -> None:
    """Give ``ddp`` a new reducer for the current shapes of its parameters, with the code that restores a pickled DDP.

    The old reducer's hooks on parameters are removed. DDP's settings stay.

    Args:
        ddp: The DDP.
        averaged: The parameters whose gradients the new reducer averages, even if they are frozen now.
    """
    wanted = set(map(id, averaged))
    hooks, ddp._comm_hooks = list(ddp._comm_hooks), []
    state = ddp.__getstate__()
    ddp._remove_autograd_hooks()
    del ddp.reducer, ddp.logger  # the old buckets are freed before there are new ones
    changed = [p for p in ddp.module.parameters() if p.requires_grad != (id(p) in wanted)]
    _switch_(changed)
    try:
        ddp.__setstate__(state)
    finally:
        _switch_(changed)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False  # the graph is recorded anew, in the next iteration
    for hook, of_hook in hooks:
        ddp.register_comm_hook(of_hook, hook)


def _switch_(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(not parameter.requires_grad)


# --- FullyShardedDataParallel, the older of torch's two ---------------------------------------------------------------

# It sets the first to True on each parameter that it flattened, and the second to False on each module whose
# parameters became views of a flat one.
FLATTENED, VIEWS_FLAT = "_fsdp_flattened", "_fsdp_use_orig_params"

# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def is_managed_by_fsdp2(module: nn.Module) -> bool:
    """Whether FSDP2 manages parameters of ``module`` itself, now gathered or sharded; detected by FSDP2's hook."""
    return any(map(_is_of_fsdp2, module._load_state_dict_post_hooks.values()))


def _is_of_fsdp2(hook: Any) -> bool:
    """Whether a hook after ``load_state_dict`` is FSDP2's."""
    return getattr(hook, "__module__", None) == "torch.distributed.fsdp._fully_shard._fsdp_param"


def take_load_hooks_(module: nn.Module) -> dict[int, Any]:
    """Remove and return FSDP2's hooks after ``load_state_dict``, which require DTensors."""
    hooks: dict[int, Any] = module._load_state_dict_post_hooks
    return {key: hooks.pop(key) for key in [key for key, hook in hooks.items() if _is_of_fsdp2(hook)]}


def put_load_hooks_(module: nn.Module, hooks: dict[int, Any]) -> None:
    """Restore the hooks that `take_load_hooks_` removed."""
    module._load_state_dict_post_hooks.update(hooks)


# --- Process groups and backward -------------------------------------------------------------------------------------


def default_store() -> Any:
    """The key-value store of the default process group."""
    return torch.distributed.distributed_c10d._get_default_store()


def running_backward() -> int:
    """Return the number of the running backward, unique even for nested ones; -1 outside of a backward."""
    return torch._C._current_graph_task_id()


def hook_first_(tensor: Tensor, function: Callable[[Tensor], None]) -> None:
    """Register a hook of ``tensor`` that calls ``function`` with its gradient, before all other hooks."""
    tensor.register_hook(function)
    hooks: Any = tensor._backward_hooks
    for key in [*hooks][:-1]:  # torch reads them in the order of the plain dict, which `move_to_end` leaves as it is
        hooks[key] = hooks.pop(key)


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` at the end of the running backward; the backward then raises the function's exception."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)
