"""The reference of a wrapped model: a module that runs the model as it stood when the reference was made."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.injection import (
    Slot,
    Slots,
    adds_nothing,
    evaluating,
    is_merged,
    refuse_fixed,
    require_tuners,
    slots_in,
    walk,
    wrapped_model,
    wrapped_of,
)
from tunerkit.layers import torch_private
from tunerkit.paths import CHILD, is_adapter_path, join
from tunerkit_transformers.head_weights import heads_shown


@attrs.define(eq=False)
class _Snapshot:
    """The state that a reference shows.

    Attributes:
        model: The wrapped model.
        wrapped: The model's record at that time. After a complete `unwrap` it has another one, or none.
        frozen: Copies of the slots of adapters that changed the output then, by module path and adapter name.
        running: How many calls of the reference are running now.
    """

    model: nn.Module
    wrapped: object
    frozen: Mapping[str, Mapping[str, Slot]]
    running: int = 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the snapshot in the model, in eval mode and without gradients.

        Slots are exchanged, not values: a backward pass that is still to come needs the live parameters untouched.
        """
        places = self._places()
        before = [(slots, slots.enabled, slots.active, dict(torch_private.own_children(slots))) for slots in places]
        with evaluating(self.model), torch.no_grad():
            self.running += 1
            try:
                for slots, frozen in places.items():
                    _show_(slots, frozen)
                yield
            finally:
                self.running -= 1
                for slots, enabled, active, children in before:
                    slots.enabled, slots.active = enabled, active
                    torch_private.own_children(slots).clear()
                    torch_private.own_children(slots).update(children)

    def _places(self) -> dict[Slots, Mapping[str, Slot]]:
        """Return what to show at each adapted module. Raises `AdapterError` if the model was changed too much."""
        if wrapped_of(self.model) is not self.wrapped:
            raise AdapterError(
                "the model was unwrapped after its reference was made, so its weights may be others; call "
                "tunerkit.reference again on the model that is trained now"
            )
        if is_merged(self.model):
            raise AdapterError("the model is merged; call tunerkit.unmerge before you use its reference")
        adapted = {path: slots for path, _, slots in walk(self.model)}
        if gone := [path for path in self.frozen if path not in adapted]:
            raise AdapterError(
                f"the reference shows adapters at {gone[0]!r}, where the model has none any more; call "
                "tunerkit.reference again"
            )
        return {slots: self.frozen.get(path, {}) for path, slots in adapted.items()}


class Reference(nn.Module):
    """A view of a wrapped model as it stood when `reference` was called. It has no parameters and no children.

    While it runs, it also has the model's own attributes and parts, which a trainer's forward may use. At other times
    it has only the plain ones, such as ``config``: the model's methods and modules would show the trained adapters.
    """

    def __init__(self, snapshot: _Snapshot) -> None:
        super().__init__()
        self._snapshot = snapshot  # a record, because a module would become a child
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as it stood: in eval mode, and without gradients."""
        # A forward that TRL has put here reads the weights of output heads itself.
        heads = heads_shown(self._snapshot.model) if "forward" in vars(self) else nullcontext()
        with self._snapshot.shown(), heads:
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._snapshot.model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors of the model as it stood. As a child of another module it adds none to that one's."""
        if args or kwargs:
            return super().state_dict(*args, **kwargs)
        own = self._snapshot.model.state_dict()
        tensors: dict[str, Tensor] = {name: tensor for name, tensor in own.items() if not is_adapter_path(name)}
        for path, slots in self._snapshot.frozen.items():
            for name, slot in slots.items():
                tensors |= slot.state_dict(prefix=join(path, f"{CHILD}.{name}."))
        return tensors

    def __getattr__(self, name: str) -> Any:
        snapshot: _Snapshot | None = vars(self).get("_snapshot")
        if snapshot is None or name.startswith("_"):  # the model's private marks are not about the reference
            return super().__getattr__(name)
        found = getattr(snapshot.model, name)
        if callable(found) and not snapshot.running:
            raise AttributeError(
                f"a reference can only be called; the model's own {name!r} would use the adapters as they are trained "
                "now"
            )
        return found

    @property
    def source(self) -> nn.Module:
        """The wrapped model that the reference runs."""
        return self._snapshot.model


def reference(model: nn.Module) -> Reference:
    """Make a frozen reference of a wrapped model, see `tunerkit.reference`."""
    tuners = require_tuners(model)
    root = wrapped_model(model)
    refuse_fixed(root, "making a reference")
    wrapped = wrapped_of(root)
    frozen: dict[str, dict[str, Slot]] = {}
    with torch.no_grad():
        for name in wrapped.active:
            if not adds_nothing(tuners[name]):
                copied: dict[int, Any] = {}  # what the adapters share is copied once
                for path, slot in slots_in(tuners[name]):
                    twin = copy.deepcopy(slot, copied).eval().requires_grad_(False)
                    twin.zero_grad(set_to_none=True)
                    frozen.setdefault(path, {})[name] = twin
    return Reference(_Snapshot(root, wrapped, frozen))


def _show_(slots: Slots, frozen: Mapping[str, Slot]) -> None:
    """Apply exactly the frozen slots."""
    for name, slot in frozen.items():
        live = slots.get(name)
        if live is not None:
            _follow_(slot, live)
        torch_private.own_children(slots)[name] = slot
    slots.enabled = True
    slots.active = tuple(frozen)


def _follow_(slot: Slot, live: Slot) -> None:
    """Move a frozen slot to where its live one may have been moved with the model.

    An adapter keeps its dtype, which may be another than the base's. What replaces the base's own has the base's.
    """
    moved = dict(live.named_parameters())
    for name, parameter in slot.named_parameters():
        if (other := moved.get(name)) is not None:
            own = name.startswith(("adapter.", f"{CHILD}."))
            parameter.data = parameter.data.to(other.device, parameter.dtype if own else other.dtype)
    for name, buffer in live.named_buffers():
        slot.get_buffer(name).data = slot.get_buffer(name).data.to(buffer.device, buffer.dtype)
