"""The child module ``tunerkit`` of an adapted module, which holds what each adapter adds there."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunerkit.layers import Adapter, BaseLayer, mark_fresh, unmark, view_bias
from tunerkit.libraries import torch_private
from tunerkit.paths import CHILD

# Marks the buffers that hold originals: no adapter's name has a "/". A buffer's name takes no dot, and those of the
# tensors of a trained copy have some.
_ASIDE, _DOT = "/", "\0"


class Slot(nn.Module):
    """What one adapter adds at one module: the method's adapter, a trained copy of the module, a trained bias.

    A copy excludes the other two. ``bias`` (out,) is a trained copy of the module's own bias. ``method`` says whose
    plugin knows the adapter.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        *,
        method: str = "",
        adapter: Adapter | None = None,
        copy: nn.Module | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.adapter = adapter
        self.copy = copy
        self.register_parameter("bias", bias)

    def forward(
        self, module: nn.Module, base: BaseLayer | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any
    ) -> Any:
        """Return the output of ``module`` as this slot changes it."""
        if self.copy is not None:
            return self.copy(*args, **kwargs)
        if self.adapter is not None:
            y = self.adapter(base, _input(args, kwargs), y)
        if self.bias is not None:
            # The difference is exactly 0 until the copy is trained, which keeps the first output bit-identical.
            # By attribute: in the replicas of DataParallel it is no Parameter.
            added = self.bias - cast(Tensor, module.bias)
            y = y + view_bias(module, base, added, y).to(y.dtype)
        return y


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the module was called with, however it was handed over."""
    return args[0] if args else next(iter(kwargs.values()))


class Slots(nn.Module):
    """All slots of one module, by adapter name; ``active`` are applied in order unless switched off or merged.

    ``features`` are the base layer's (out, in) when it was adapted.
    """

    def __init__(self, base: BaseLayer | None) -> None:
        super().__init__()
        self.base = base
        self.features = None if base is None else (base.out_features, base.in_features)
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.permanent = False

    def __setattr__(self, name: str, value: object) -> None:
        # nn.Module refuses to set an attribute that has a child's name, and an adapter may be called "training".
        object.__setattr__(self, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For deep copies and pickles: one made inside `tunerkit.disabled` has no block to leave, so it is enabled.

        While merged the base stands in the module then, so the copy is not merged.
        """
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        if not self.enabled:
            self.enabled = True
            self.merged = ()
            self.forget_originals()

    def put(self, name: str, slot: Slot) -> None:
        """Add a slot; into the dict of children, since `add_module` refuses names such as "forward" or "keys"."""
        torch_private.own_children(self)[name] = slot
        self.active = (*self.active, name)

    def get(self, name: str) -> Slot | None:
        """The slot of one adapter; by name alone, for an attribute may have it too."""
        slot = torch_private.own_children(self).get(name)
        return slot if isinstance(slot, Slot) else None

    def drop(self, name: str) -> None:
        """Take a slot out."""
        del torch_private.own_children(self)[name]
        self.active = tuple(other for other in self.active if other != name)

    def rename(self, old: str, new: str) -> None:
        """Give a slot another name in its place; nothing else moves, so the order in ``state_dict`` stays."""
        modules = torch_private.own_children(self)
        slots = list(modules.items())
        modules.clear()
        modules.update((new if name == old else name, slot) for name, slot in slots)
        self.active = tuple(new if name == old else name for name in self.active)
        self.merged = tuple(new if name == old else name for name in self.merged)

    @property
    def copying(self) -> tuple[str, ...]:
        """The adapters that train a copy of this module: no two of them can be active together."""
        return tuple(name for name in self.names if (slot := self.get(name)) is not None and slot.copy is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that have a slot here, the oldest first."""
        return tuple(torch_private.own_children(self))

    @property
    def originals(self) -> dict[str, Tensor]:
        """The tensors set aside by a merge, by their local name in the module."""
        buffers = self.named_buffers(recurse=False, remove_duplicate=False)
        return {name[1:].replace(_DOT, "."): tensor for name, tensor in buffers if name.startswith(_ASIDE)}

    def set_aside(self, originals: Mapping[str, Tensor]) -> None:
        """Keep ``originals``, in buffers so that they follow `model.to(...)`, outside ``state_dict``."""
        for name, tensor in originals.items():
            self.register_buffer(_aside(name), tensor, persistent=False)

    def forget_originals(self) -> None:
        """Drop what `set_aside` kept."""
        for name in self.originals:
            delattr(self, _aside(name))

    def original(self, name: str, live: Tensor) -> Tensor:
        """The base's own tensor, also while a merged one stands in its place."""
        return self.originals.get(name, live).detach() if self.enabled else live.detach()


def _aside(name: str) -> str:
    return _ASIDE + name.replace(".", _DOT)


def slots_of(module: nn.Module) -> Slots | None:
    """The slots at ``module`` itself, or None."""
    slots = torch_private.own_children(module).get(CHILD)
    return slots if isinstance(slots, Slots) else None


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` with their paths, each once and in its order, without what adapters put there.

    ``named_modules`` would walk through every adapter too, which in a wrapped model are most of the modules.
    """
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            prefix = f"{path}." if path else ""
            # From the last to the first, since the end of the list comes next.
            for name, child in reversed(torch_private.own_children(module).items()):
                if child is not None and type(child) is not Slots:
                    waiting.append((prefix + name, child))


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slots]]:
    """Every adapted module of ``model`` with its dotted path and its slots, in model order."""
    for path, module in base_modules(model):
        slots = slots_of(module)
        if slots is not None:
            yield path, module, slots


def apply_slots(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook of every adapted module. It writes no Python state: that would recompile compiled models."""
    slots = torch_private.own_children(module)[CHILD]
    assert isinstance(slots, Slots)
    if slots.enabled and not slots.merged:
        own, marked, children = output, False, torch_private.own_children(slots)
        if slots.active and slots.base is not None and not torch.compiler.is_compiling():
            marked = mark_fresh(slots.base, _input(args, kwargs), own)
        for name in slots.active:
            output = children[name](module, slots.base, args, kwargs, output)  # type: ignore[misc]
        if marked:
            unmark(own)
    return output
