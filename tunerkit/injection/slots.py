"""The child module ``tunerkit`` of an adapted module: it holds what each adapter adds there."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunerkit.layers import Adapter, BaseLayer, mark_fresh, unmark, view_bias
from tunerkit.libraries import torch_private
from tunerkit.paths import CHILD, join

# Buffers hold the originals. Adapter names have no "/", so the prefix keeps the two apart. Buffer names must have no
# dot, and the tensors of a trained copy have dots in theirs.
_ORIGINAL, _DOT = "/", "\0"


class Slot(nn.Module):
    """What one adapter adds at one module: the method's adapter, a trained copy of the module, a trained bias.

    A copy excludes the other two.

    Attributes:
        method: The method's name; its plugin computes the adapter's delta.
        adapter: The method's adapter.
        copy: A trained copy of the module, which replaces its output.
        bias: A trained copy of the module's own bias, (out,).
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
        """Return the output ``y`` of ``module`` as this slot changes it."""
        if self.copy is not None:
            return self.copy(*args, **kwargs)
        if self.adapter is not None:
            y = self.adapter(base, _input(args, kwargs), y)
        if self.bias is not None:
            # Until the copy is trained, the difference is exactly 0, so the first output is bit-identical.
            # ``module.bias`` and not get_parameter: in the replicas of DataParallel it is no Parameter.
            added = self.bias - cast(Tensor, module.bias)
            y = y + view_bias(module, base, added, y).to(y.dtype)
        return y


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the module's input, passed by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


class Slots(nn.Module):
    """All slots of one module, by adapter name.

    Attributes:
        base: The module as a base layer; None if no kind matches it.
        features: The base layer's (out, in) at the time when it was adapted.
        active: The adapters that forward applies, in order, unless switched off or merged.
        enabled: False inside `tunerkit.disabled`.
        merged: The adapters that are merged into the module.
        permanent: Whether the merge kept no originals.
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
        # nn.Module refuses to set an attribute with the name of a child, and an adapter may be called "training".
        object.__setattr__(self, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a deep copy or pickle. One made inside `tunerkit.disabled` has no block to leave, so it is enabled.

        If the original was merged, its module held the base at that time, so the copy is not merged.
        """
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        if not self.enabled:
            self.enabled = True
            self.merged = ()
            self.forget_originals()

    def put(self, name: str, slot: Slot) -> None:
        """Add a slot. It goes directly into the dict of children: `add_module` refuses names such as "forward"."""
        torch_private.own_children(self)[name] = slot
        self.active = (*self.active, name)

    def get(self, name: str) -> Slot | None:
        """Return the slot of one adapter. Attributes of the same name are ignored."""
        return cast(Slot | None, torch_private.own_children(self).get(name))

    def drop(self, name: str) -> None:
        """Remove a slot, if the adapter has one here."""
        torch_private.own_children(self).pop(name, None)
        self.active = tuple(other for other in self.active if other != name)

    def rename(self, old: str, new: str) -> None:
        """Rename a slot in its place, if the adapter has one here. The order in ``state_dict`` stays."""
        children = torch_private.own_children(self)
        slots = [(new if name == old else name, slot) for name, slot in children.items()]
        children.clear()
        children.update(slots)
        self.active = tuple(new if name == old else name for name in self.active)
        self.merged = tuple(new if name == old else name for name in self.merged)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that have a slot here, the oldest first."""
        return tuple(torch_private.own_children(self))

    @property
    def applied(self) -> list[Slot]:
        """The slots of the active adapters, in order."""
        return [slot for name in self.active if (slot := self.get(name)) is not None]

    @property
    def copies(self) -> dict[str, nn.Module]:
        """The trained copies of this module by adapter. No two of them can be active together."""
        slots = self.named_children()
        return {name: slot.copy for name, slot in slots if isinstance(slot, Slot) and slot.copy is not None}

    @property
    def originals(self) -> dict[str, Tensor]:
        """The tensors that a merge has set aside, by their local name in the module."""
        buffers = self.named_buffers(recurse=False, remove_duplicate=False)
        return {name.removeprefix(_ORIGINAL).replace(_DOT, "."): tensor for name, tensor in buffers}

    def set_aside(self, originals: Mapping[str, Tensor]) -> None:
        """Keep ``originals`` in buffers, so that they follow `model.to(...)`, but outside ``state_dict``."""
        for name, tensor in originals.items():
            self.register_buffer(_ORIGINAL + name.replace(".", _DOT), tensor, persistent=False)

    def forget_originals(self) -> None:
        """Free what `set_aside` kept."""
        for name, _ in list(self.named_buffers(recurse=False, remove_duplicate=False)):
            delattr(self, name)

    def original(self, name: str, live: Tensor) -> Tensor:
        """Return the base's own tensor, also while a merged one replaces it in the module."""
        # `originals` costs a search through the buffers, and only a merged module has some.
        return (self.originals.get(name, live) if self.merged and self.enabled else live).detach()


def slots_of(module: nn.Module) -> Slots | None:
    """Return the slots at ``module`` itself, or None."""
    slots = torch_private.own_children(module).get(CHILD)
    return slots if isinstance(slots, Slots) else None


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


def apply_slots(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Apply the active slots: the forward hook of every adapted module.

    It writes no Python state, which would recompile compiled models.
    """
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
