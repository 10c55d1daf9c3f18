"""Mark quantized models while they have adapters, because transformers' Trainer rejects them without the mark.

transformers recognizes its own adapters, peft's, by an attribute of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tunerkit.plugin.trainers import base_modules
from tunerkit_transformers.transformers_private import HAS_ADAPTERS, IS_QUANTISED


def mark_trainable_(model: nn.Module) -> None:
    """Mark the quantized models of transformers in ``model`` as having adapters."""
    for _, module in base_modules(model):
        # A model with peft's own adapters has the mark already.
        if getattr(module, IS_QUANTISED, False) is True and getattr(module, HAS_ADAPTERS, None) is False:
            vars(module)[HAS_ADAPTERS] = True


def unmark_trainable_(model: nn.Module) -> None:
    """Undo `mark_trainable_`."""
    for _, module in base_modules(model):
        if _is_marked(module):
            del vars(module)[HAS_ADAPTERS]


@contextmanager
def unmarked(module: nn.Module) -> Iterator[None]:
    """Remove the mark of ``module`` inside the block: with it, ``save_pretrained`` would look for peft's adapters."""
    if not _is_marked(module):
        yield
        return
    mark = vars(module).pop(HAS_ADAPTERS)
    try:
        yield
    finally:
        vars(module)[HAS_ADAPTERS] = mark


def _is_marked(module: nn.Module) -> bool:
    # peft's adapters come with a config; `peft_config` is then an attribute of the instance.
    return vars(module).get(HAS_ADAPTERS) is True and "peft_config" not in vars(module)
