"""The reference of a wrapped model: a module that runs the model with the adapters' earlier values."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import AdapterError
from tunerkit.plugin.trainers import Slot, Slots, adds_nothing, evaluating, refuse_fixed, slots_in, walk
from tunerkit_transformers.head_weights import heads_shown
from tunerkit_transformers.save_pretrained import CHILD, is_adapter_path

# The attribute of a wrapped model with a token, until its last adapter leaves it.
_GENERATION: Final = "_tunerkit_generation"


@attrs.define(eq=False)
class _Snapshot:
    """The adapters of a model at the time when its reference was made.

    Attributes:
        model: The wrapped model.
        generation: The model's token at that time. Unwrapping removes the token; wrapping again makes another one.
        frozen: Frozen copies of the slots of adapters that changed the output, by module path and adapter name.
        running: The number of calls of the reference in progress.
    """

    model: nn.Module
    generation: object
    frozen: Mapping[str, Mapping[str, Slot]]
    running: int = 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside the block, the model has the snapshot's slots, in eval mode and without gradients.

        Slots are exchanged and values are not overwritten, since a pending backward needs the live parameters.
        """
        places = self._places()
        before = [(slots, slots.enabled, slots.active, _by_name(slots)) for slots in places]
        with evaluating(self.model), torch.no_grad():
            self.running += 1
            try:
                for slots, frozen in places.items():
                    _show_(slots, frozen)
                yield
            finally:
                self.running -= 1
                for slots, enabled, active, own in before:
                    for name in slots.names:
                        slots.drop(name)
                    for name, slot in own.items():
                        slots.put(name, slot)
                    slots.enabled, slots.active = enabled, active

    def _places(self) -> dict[Slots, Mapping[str, Slot]]:
        """Return the frozen slots of each adapted module.

        Raises `AdapterError` if the model was unwrapped, is merged, or lost an adapted module.
        """
        if vars(self.model).get(_GENERATION) is not self.generation:
            raise AdapterError(
                "the model was unwrapped after its reference was made, so its weights may have changed; call "
                "tunerkit.reference again on the model that is trained now"
            )
        adapted = {path: slots for path, _, slots in walk(self.model)}
        if any(slots.merged for slots in adapted.values()):
            raise AdapterError("the model is merged; call tunerkit.unmerge before you use its reference")
        if gone := [path for path in self.frozen if path not in adapted]:
            raise AdapterError(
                f"the reference shows adapters at {gone[0]!r}, where the model has none any more; call "
                "tunerkit.reference again"
            )
        return {slots: self.frozen.get(path, {}) for path, slots in adapted.items()}


class Reference(nn.Module):
    """Runs a wrapped model with the adapters' values from the call of `reference`; has no parameters or children.

    During a call, it has the model's attributes and submodules, which a trainer's forward may use. At other times it
    has only plain attributes, such as ``config``: methods and submodules would use the trained adapters.
    """

    def __init__(self, snapshot: _Snapshot) -> None:
        super().__init__()
        self._snapshot = snapshot  # a record, because a module would become a child
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the snapshot's adapters, in eval mode and without gradients."""
        # A forward that TRL has put here reads the weights of output heads itself.
        heads = heads_shown(self._snapshot.model) if "forward" in vars(self) else nullcontext()
        with self._snapshot.shown(), heads:
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._snapshot.model(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors of the base and the snapshot's adapters; none within a parent's ``state_dict()``."""
        if args or kwargs:
            return super().state_dict(*args, **kwargs)
        own = self._snapshot.model.state_dict()
        tensors: dict[str, Tensor] = {name: tensor for name, tensor in own.items() if not is_adapter_path(name)}
        for path, slots in self._snapshot.frozen.items():
            for name, slot in slots.items():
                tensors |= slot.state_dict(prefix=f"{path}.{CHILD}.{name}.".lstrip("."))
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
    tuners = tunerkit.adapters(model)
    if not tuners:
        raise AdapterError(f"this {type(model).__name__} has no adapter; call tunerkit.wrap or tunerkit.load first")
    root = next(iter(tuners.values())).model
    refuse_fixed(root, "making a reference")
    frozen: dict[str, dict[str, Slot]] = {}
    with torch.no_grad():
        for name in tunerkit.active(root):
            if not adds_nothing(tuners[name]):
                copied: dict[int, Any] = {}  # shared modules are copied once
                for path, slot in slots_in(tuners[name]):
                    twin = copy.deepcopy(slot, copied).eval().requires_grad_(False)
                    twin.zero_grad(set_to_none=True)
                    frozen.setdefault(path, {})[name] = twin
    return Reference(_Snapshot(root, vars(root).setdefault(_GENERATION, object()), frozen))


def end_generation_(model: nn.Module) -> None:
    """Invalidate the references of a model that has lost its last adapter: its weights may change now."""
    vars(model).pop(_GENERATION, None)


def _by_name(slots: Slots) -> dict[str, Slot]:
    return {name: slot for name in slots.names if (slot := slots.get(name)) is not None}


def _show_(slots: Slots, frozen: Mapping[str, Slot]) -> None:
    """Put the frozen slots into one module, and activate only these."""
    for name, slot in frozen.items():
        live = slots.get(name)
        if live is not None:
            _follow_(slot, live)
        slots.put(name, slot)
    slots.enabled = True
    slots.activate(frozen)


def _follow_(slot: Slot, live: Slot) -> None:
    """Move a frozen slot to the devices of the live slot.

    The adapter keeps its dtype. Copies and biases take the live slot's dtype, which is the base's.
    """
    moved = dict(live.named_parameters())
    for name, parameter in slot.named_parameters():
        if (other := moved.get(name)) is not None:
            own = name.startswith(("adapter.", f"{CHILD}."))
            parameter.data = parameter.data.to(other.device, parameter.dtype if own else other.dtype)
    for name, buffer in live.named_buffers():
        slot.get_buffer(name).data = slot.get_buffer(name).data.to(buffer.device, buffer.dtype)
