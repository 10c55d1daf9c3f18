"""Replace the adapter methods of transformers and PEFT on a wrapped model: each raises an error that names tunerkit's.

The methods of transformers search for PEFT's layers and, without any, ask the user to upgrade PEFT. As in
`save_pretrained`, each is replaced on the instance by a `functools.partial` of a function of this file, so copies and
pickles have their own. Calls from transformers itself are forwarded.
"""

import functools
import inspect
import sys
import types
from typing import Any, Final

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.plugin.trainers import base_modules, elsewhere
from tunerkit_transformers.transformers_private import ADAPTER_CALLS

# Of classes that inherit them from transformers. A model may have others of the same name, as speech models do.
_OF_TRANSFORMERS: Final = (
    *("load_adapter", "add_adapter", "set_adapter", "delete_adapter", "active_adapters", "enable_adapters"),
    *("disable_adapters", "get_adapter_state_dict", "enable_peft_hotswap"),
)
# Of a PeftModel, which people try on the model that `tunerkit.wrap` returned.
_OF_PEFT: Final = (
    *("print_trainable_parameters", "get_nb_trainable_parameters", "merge_and_unload", "unload", "merge_adapter"),
    *("unmerge_adapter", "disable_adapter", "add_weighted_adapter", "update_and_allocate"),
)
_GENERATE: Final = "generate"
_ROWS: Final = "adapter_names"  # the argument by which PEFT's models take an adapter for each row of a batch
_NAMES: Final = ("__module__", "__name__", "__qualname__", "__doc__")  # annotations are the method's own


def watch_calls_(model: nn.Module) -> None:
    """Make the adapter methods of transformers and PEFT raise, on ``model`` and the models inside it: see `refuse`."""
    for _, module in base_modules(model):
        for name in _OF_TRANSFORMERS:
            if getattr(getattr(type(module), name, None), "__module__", "") == ADAPTER_CALLS:
                vars(module).setdefault(name, functools.partial(refuse, module, name))
    # People write model.base_model.update_and_allocate(step), as PEFT's pages do.
    for owner in (each for each in (model, getattr(model, "base_model", None)) if isinstance(each, nn.Module)):
        for name in _OF_PEFT:
            if not hasattr(owner, name):
                vars(owner)[name] = functools.partial(refuse, None, name)  # None: no method of its class to pass on
    if inspect.isfunction(getattr(type(model), _GENERATE, None)):
        vars(model).setdefault(_GENERATE, _watched(model))


def _watched(model: Any) -> Any:
    """Return the replacement of ``model.generate``, with the signature and attributes that libraries read."""
    method = types.MethodType(getattr(type(model), _GENERATE), model)
    watched: Any = functools.update_wrapper(functools.partial(generate, model), method, _NAMES, ())
    vars(watched).update(__self__=model, __func__=method.__func__)
    return watched


def unwatch_calls_(model: nn.Module) -> None:
    """Undo `watch_calls_`."""
    for module in model.modules():
        for name in (*_OF_TRANSFORMERS, *_OF_PEFT, _GENERATE):
            found = vars(module).get(name)
            if isinstance(found, functools.partial) and found.func in (refuse, generate):
                del vars(module)[name]


def refuse(module: nn.Module | None, name: str, *args: Any, **kwargs: Any) -> Any:
    """Raise `AdapterError` with the replacement for ``module.name(...)``, unless transformers itself calls it."""
    caller = str(sys._getframe(1).f_globals.get("__name__", ""))
    if module is not None and caller.partition(".")[0] == "transformers":
        return getattr(type(module), name)(module, *args, **kwargs)
    kind = "model" if module is None else type(module).__name__
    raise AdapterError(f"{name} is for adapters of PEFT, and this {kind} has tunerkit's{elsewhere(name)}")


def generate(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model's ``generate``; reject `adapter_names`, which transformers would report as a typo."""
    if kwargs.get(_ROWS) is not None and _ROWS not in inspect.signature(type(module).forward).parameters:
        refuse(None, _ROWS)
    return type(module).generate(module, *args, **kwargs)
