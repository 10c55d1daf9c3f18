"""What is asked of a whole model: the modules of its base, those with adapters, and whether these take effect."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection.slots import Slots, apply_slots
from tunerkit.layers import torch_private
from tunerkit.paths import CHILD, join


def inside(model: object) -> nn.Module:
    """Return the model that `torch.compile` or ``nn.DataParallel`` was given: paths must not depend on the wrapper.

    Raises:
        AdapterError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    inner = model.module if isinstance(model, nn.DataParallel) else torch_private.compiled_from(model)
    return model if inner is None else inside(inner)


def slots_of(module: nn.Module) -> Slots | None:
    """Return the slots at ``module`` itself, or None."""
    slots = torch_private.own_children(module).get(CHILD)
    return slots if isinstance(slots, Slots) else None


def is_called(module: nn.Module) -> bool:
    """Whether an adapted module is called itself. Otherwise its owner uses its weight, which core overrides."""
    return torch_private.has_hook(module, apply_slots)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of ``model`` with their paths, each once and in its order, without what adapters put there.

    ``named_modules`` would also visit every adapter, and most modules of a wrapped model are in adapters.
    """
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            # In reverse, since the last entry of the list is visited first.
            for name, child in reversed(torch_private.own_children(module).items()):
                if child is not None and type(child) is not Slots:
                    waiting.append((join(path, name), child))


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slots]]:
    """Yield every adapted module of ``model`` with its dotted path and its slots, in model order."""
    for path, module in base_modules(model):
        if (slots := slots_of(module)) is not None:
            yield path, module, slots


def is_merged(model: nn.Module) -> bool:
    """Return whether adapters are merged into ``model`` now."""
    return any(slots.merged for _, _, slots in walk(model))


def refuse_disabled(model: nn.Module) -> None:
    """Raise `AdapterError` inside ``with disabled(model)``, where the base replaces what a caller would change."""
    if any(not slots.enabled for _, _, slots in walk(model)):
        raise AdapterError("the model's adapters are disabled; leave the block of tunerkit.disabled first")


def refuse_fixed(model: nn.Module, what: str) -> None:
    """Raise `AdapterError` if ``model`` is disabled or merged: then ``what`` would not change the output."""
    refuse_disabled(model)
    if is_merged(model):
        raise AdapterError(f"the model is merged; call tunerkit.unmerge before {what}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, without dropout and without changing statistics of batch norms.

    Afterwards each module has the mode that it had before: parts may have another one than the whole.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
