"""Wrap ``save_pretrained`` of a model with adapters: it warns, and writes no adapter keys with merged weights.

The method is replaced on the instance by a `functools.partial` of a function of this file with the module as its
argument, so a deep copy and a pickle of the model have their own. Quantized models are also marked as adapted by peft,
with an attribute: without it, transformers' Trainer rejects them.
"""

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from tunerkit.errors import TunerkitWarning
from tunerkit.plugin.trainers import base_modules, walk
from tunerkit_transformers.transformers_private import HAS_ADAPTERS, IS_QUANTISED

CHILD: Final = "tunerkit"  # the child of an adapted module that holds its adapters: path.tunerkit.adapter.parameter
_NAME = "save_pretrained"
# The attribute of a module with the folder of the Trainer's run whose checkpoints a warning was about.
_RUN = "_tunerkit_run"


def watch_saving_(model: nn.Module) -> None:
    """Replace ``save_pretrained`` on ``model`` and the modules inside it, once each, and mark quantized models."""
    for _, module in base_modules(model):
        # A model with peft's own adapters has the mark already.
        if getattr(module, IS_QUANTISED, False) is True and getattr(module, HAS_ADAPTERS, None) is False:
            vars(module)[HAS_ADAPTERS] = True
        if hasattr(type(module), _NAME) and not _is_watched(module):
            # None for the class's method. A method of the instance is called, and restored later.
            vars(module)[_NAME] = functools.partial(save_pretrained, module, vars(module).get(_NAME))


def unwatch_saving_(model: nn.Module) -> None:
    """Undo `watch_saving_`."""
    for module in model.modules():
        if _is_watched(module):
            _, own = vars(module)[_NAME].args
            if own is None:
                del vars(module)[_NAME]
            else:
                vars(module)[_NAME] = own
        if _is_marked(module):
            del vars(module)[HAS_ADAPTERS]
        vars(module).pop(_RUN, None)


def _is_marked(module: nn.Module) -> bool:
    # peft's adapters come with a config; `peft_config` is then an attribute of the instance.
    return vars(module).get(HAS_ADAPTERS) is True and "peft_config" not in vars(module)


@contextmanager
def _unmarked(module: nn.Module) -> Iterator[None]:
    """Inside the block, ``module`` has no peft mark: with it, ``save_pretrained`` searches for peft's adapters."""
    if not _is_marked(module):
        yield
        return
    mark = vars(module).pop(HAS_ADAPTERS)
    try:
        yield
    finally:
        vars(module)[HAS_ADAPTERS] = mark


def _is_watched(module: nn.Module) -> bool:
    found = vars(module).get(_NAME)
    return isinstance(found, functools.partial) and found.func is save_pretrained


def save_pretrained(module: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Call the original method, ``own`` or the class's, and warn if adapters will be lost.

    If adapters are merged or `disabled`, only the module's own weights are saved, without the adapters' keys.
    """
    method: Callable[..., Any] = own or functools.partial(getattr(type(module), _NAME), module)
    slots = [slots for _, _, slots in walk(module)]
    if slots and not any(each.merged or not each.enabled for each in slots):
        if _is_first_of_run(module, kwargs.get("save_directory", next(iter(args), None))):
            warnings.warn(_LOST.format(type(module).__name__), TunerkitWarning, stacklevel=2)
        with _unmarked(module):
            return method(*args, **kwargs)
    # The method takes the weights from an argument or from the model.
    with _unmarked(module), module.register_state_dict_post_hook(_drop_adapters):
        return method(*map(_without_adapters, args), **{name: _without_adapters(kwargs[name]) for name in kwargs})


def _is_first_of_run(module: nn.Module, folder: object) -> bool:
    """Whether to warn at ``folder``: not for later checkpoints of the same run."""
    run = checkpoints_of(folder)
    if run is None:
        return True
    before, vars(module)[_RUN] = vars(module).get(_RUN), run
    return bool(before != run)


def checkpoints_of(folder: object) -> str | None:
    """Return the folder of a Trainer's run if ``folder`` is named like one of its checkpoints, else None."""
    if not isinstance(folder, str | os.PathLike):
        return None
    run, name = os.path.split(os.path.normpath(os.fspath(folder)))
    return run if re.fullmatch(r"checkpoint-\d+", name) else None


def is_adapter_path(name: str) -> bool:
    """Whether a parameter with this dotted name belongs to an adapter."""
    return CHILD in name.split(".")[:-1]


def _drop_adapters(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for key in filter(is_adapter_path, list(state_dict)):
        del state_dict[key]


def _without_adapters(value: Any) -> Any:
    """Return a copy without the adapters' keys if ``value`` is a state dict with such keys, else ``value``."""
    if not isinstance(value, Mapping) or not any(isinstance(key, str) and is_adapter_path(key) for key in value):
        return value
    return {key: tensor for key, tensor in value.items() if not is_adapter_path(key)}


_LOST = (
    "{0}.save_pretrained writes the base model, and its adapters under names that from_pretrained ignores: what it "
    "loads is the base without them. To keep the adapters, call tunerkit.save(model, path). To write a model that "
    "contains them, call tunerkit.unwrap(model, keep_merged=True) first. Under a Trainer, tunerkit.attach(model, "
    "trainer) makes each checkpoint hold the adapters"
)
