"""The child ``tunerkit`` of an adapted module, with one slot per adapter; the forward hook; the search for slots."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.layers import Adapter, BaseLayer, mark, torch_private, unmark, view_bias, whole_shape
from tunerkit.paths import CHILD
from tunerkit.records import Rounding

# Originals are buffers. The prefix avoids collisions, since adapter names have no "/". Buffer names cannot have dots,
# which the tensors of a trained copy have.
_ORIGINAL, _DOT = "/", "\0"
_DECISIVE = ("base", "active", "enabled", "merged")  # attributes of slots that determine `effect`


class Slot(nn.Module):
    """The trained modules and parameters of one adapter at one adapted module."""

    bias: nn.Parameter | None  # a trained copy of the module's own bias, (out,)

    def __init__(
        self,
        *,
        method: str = "",
        adapter: Adapter | None = None,
        copy: nn.Module | None = None,
        bias: nn.Parameter | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.adapter = adapter  # the method's adapter, whose delta its plugin computes
        if shared is not None:
            self.add_module(CHILD, shared)
        # The names of the parameters that the method built without gradients, which are never trained.
        self.fixed = frozenset(name for name, parameter in self.named_parameters() if not parameter.requires_grad)
        self.copy = copy  # a trained copy of the module, which replaces its output; then nothing else is set
        self.register_parameter("bias", bias)
        self.reads_output = adapter is not None and adapter.reads_output is not False

    @property
    def shared(self) -> nn.Module | None:
        """The module that all adapters of the method share; None except in the first target's slot."""
        return torch_private.own_children(self).get(CHILD)

    def forward(
        self, module: nn.Module, base: BaseLayer | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any
    ) -> Any:
        """Return ``y``, the output of ``module``, with this slot's change applied."""
        if self.copy is not None:
            return self.copy(*args, **kwargs)
        adapter = self.adapter
        if adapter is not None:
            x = input_of(args, kwargs)
            if base is not None and not base.has_weight:
                _refuse_output(self.method, module, y)
            # A block may return a tuple, with its output first.
            y = (adapter(base, x, y[0]), *y[1:]) if type(y) is tuple else adapter(base, x, y)
        if self.bias is not None:
            # Until the copy is trained, the difference is exactly 0, so the first output is bit-identical.
            # ``module.bias`` and not get_parameter: replicas of DataParallel have no Parameter there.
            added = self.bias - cast(Tensor, module.bias)
            y = y + view_bias(module, base, added, y).to(y.dtype)
        return y


def _refuse_output(method: str, module: nn.Module, output: object) -> None:
    own = output[0] if type(output) is tuple and output else output
    if not isinstance(own, Tensor):
        raise AdapterError(
            f"method {method!r} cannot adapt this {type(module).__name__}: it returned a {type(output).__name__}, and "
            "an adapter needs a tensor, or a tuple that begins with a tensor; exclude it from the targets"
        )


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the module's input, passed by position or by keyword; None if it takes none."""
    return args[0] if args else next(iter(kwargs.values()), None)


class Slots(nn.Module):
    """The slots of all adapters at one module, by adapter name."""

    base: BaseLayer | None  # the module as a base layer; None if no kind matches it
    features: tuple[int, ...] | None  # the base layer's shape when it was adapted
    active: tuple[str, ...]  # the adapters that forward applies, in order, unless disabled or merged
    enabled: bool  # False inside `tunerkit.disabled`
    merged: tuple[str, ...]  # the adapters that are merged into the module
    permanent: bool  # whether the merge discarded the originals
    rounding: Rounding | None  # the rounding errors of a merge into a packed weight
    whole: dict[str, Any]  # the originals of a packed weight, by attribute: Parameter objects, quantization state
    parting: Any  # the untying of a merged module, see `tunerkit.serialization.untying`
    # The function that the forward hook applies; None for no change.
    effect: "Callable[[Slots, nn.Module, tuple[Any, ...], Mapping[str, Any], Any, bool], Any] | None"

    def __init__(self, base: BaseLayer | None) -> None:
        super().__init__()
        vars(self).update(active=(), enabled=True, merged=(), permanent=False, rounding=None, whole={}, parting=None)
        self.see_as(base)

    def holder(self, module: nn.Module) -> nn.Module:
        """Return the module that has the tensors of ``module``, which has these slots: for a stack, its owner."""
        return module if self.base is None else self.base.holder

    def see_as(self, base: BaseLayer | None) -> None:
        """Set the module's base layer, and record its current sizes in ``features``."""
        self.base = base
        self.features = None if base is None or not base.has_weight else base.shape

    def is_resized(self, module: nn.Module) -> bool:
        """Whether the module was resized after it was adapted."""
        if self.base is not None and self.features is not None:
            return self.base.shape != self.features
        own = dict(module.named_parameters())
        copied = (named for copy in self.copies.values() for named in copy.named_parameters() if named[0] in own)
        return any(whole_shape(own[name]) != whole_shape(parameter) for name, parameter in copied)

    def __setattr__(self, name: str, value: object) -> None:
        # nn.Module refuses to set an attribute with the name of a child, and an adapter may be called "training".
        object.__setattr__(self, name, value)
        if name in _DECISIVE:
            names = self.active if self.enabled and not self.merged else ()
            only = self.get(names[0]) if len(names) == 1 else None
            is_alone = only is not None and only.copy is None and only.bias is None
            is_plain = is_alone and self.base is not None and self.base.has_weight
            self.effect = None if not names else _add if is_plain else _apply_each

    def __repr__(self) -> str:
        # Without ranks: torch prints equal layers of a model as one.
        full = {name: " (trained in full)" for name, slot in self._by_name.items() if slot.copy is not None}
        return ", ".join(f"{name!r}: {slot.method}{full.get(name, '')}" for name, slot in self._by_name.items())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a deep copy or pickle. A copy made inside `tunerkit.disabled` is enabled, and not merged.

        Inside `disabled`, a merged module has the base's weights, and so has the copy.
        """
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        was_enabled, self.enabled = self.enabled, True
        if not was_enabled:
            self.forget_merge()

    @property
    def _by_name(self) -> dict[str, Slot]:
        """Torch's own dict of children: the slots by adapter name, among them names that `add_module` would reject."""
        slots: Any = torch_private.own_children(self)
        return slots  # type: ignore[no-any-return]

    def put(self, name: str, slot: Slot) -> None:
        """Add an adapter's slot to this module, and activate it after the active ones."""
        self._by_name[name] = slot
        self.activate((*self.active, name))

    def activate(self, names: Iterable[str]) -> None:
        """Activate exactly the named adapters with a slot at this module; readers of the base's output come first."""
        own = self._by_name
        ours = (name for name in names if name in own)
        self.active = tuple(sorted(ours, key=lambda name: not own[name].reads_output))

    def get(self, name: str) -> Slot | None:
        """Return an adapter's slot at this module; None if there is none."""
        return cast("Slot | None", torch_private.own_children(self).get(name))

    def drop(self, name: str) -> None:
        """Remove an adapter's slot from this module, if there is one."""
        self.active = tuple(other for other in self.active if other != name)
        self._by_name.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Rename an adapter's slot at this module, if there is one; keep the order in ``state_dict``."""
        slots = [(new if name == old else name, slot) for name, slot in self._by_name.items()]
        self._by_name.clear()
        self._by_name.update(slots)
        self.active = tuple(new if name == old else name for name in self.active)
        self.merged = tuple(new if name == old else name for name in self.merged)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters with a slot at this module, the oldest first."""
        return tuple(self._by_name)

    @property
    def applied(self) -> list[Slot]:
        """The slots of this module's active adapters, in order."""
        return [self._by_name[name] for name in self.active]

    @property
    def copies(self) -> dict[str, nn.Module]:
        """The trained copies of this module by adapter. Only one of them can be active."""
        return {name: slot.copy for name, slot in self._by_name.items() if slot.copy is not None}

    @property
    def originals(self) -> dict[str, Any]:
        """The module's values that a merge replaced, by local name: tensors, and attributes of a packed weight."""
        buffers = self.named_buffers(recurse=False, remove_duplicate=False)
        return self.whole | {name.removeprefix(_ORIGINAL).replace(_DOT, "."): tensor for name, tensor in buffers}

    def set_aside(self, originals: Mapping[str, Any]) -> None:
        """Store values that a merge replaced, outside ``state_dict``: tensors as buffers, which `model.to()` moves."""
        self.whole = {}
        for name, value in originals.items():
            if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
                self.whole[name] = value  # the merge replaced the attribute, not the values of a tensor
            else:
                self.register_buffer(_ORIGINAL + name.replace(".", _DOT), value, persistent=False)

    def forget_merge(self) -> None:
        """Reset everything that a merge recorded in this module, and free the originals."""
        for name, _ in list(self.named_buffers(recurse=False, remove_duplicate=False)):
            delattr(self, name)
        self.whole, self.rounding, self.parting = {}, None, None
        self.merged, self.permanent = (), False

    def original(self, name: str, live: Tensor) -> Tensor:
        """Return the base's original tensor, even while a merged one replaces it in the module."""
        # `originals` searches the buffers, which costs time.
        found: Tensor = self.originals.get(name, live) if self.merged and self.enabled else live
        return found.detach()


def apply_slots(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
    """Forward hook of every adapted module: apply the active slots. The function has no state, to avoid recompilation.

    Raises `AdapterError` if torch's quantization has copied the hook to a module without slots.
    """
    slots = torch_private.own_children(module).get(CHILD)
    if not isinstance(slots, Slots):
        raise AdapterError(
            f"this {type(module).__name__} replaced an adapted module and lost its adapters, as happens when a "
            "wrapped model is quantized. Quantize the base before tunerkit.wrap, or call tunerkit.unwrap(model, "
            "keep_merged=True) before you quantize"
        )
    if slots.effect is None:
        return output
    if torch.compiler.is_compiling():
        return slots.effect(slots, module, args, kwargs, output, True)
    try:
        return slots.effect(slots, module, args, kwargs, output, False)
    except (AdapterError, IndexError, RuntimeError) as error:
        if not slots.is_resized(module):
            raise
        raise AdapterError(
            f"the {type(module).__name__} was resized after wrapping, and its adapter still has the old size: resize "
            "the model first, then call tunerkit.wrap or tunerkit.load"
        ) from error


def _add(slots: Slots, module: nn.Module, args: Any, kwargs: Any, own: Any, traced: bool) -> Any:
    """Return the output of a layer with a known weight and a single active adapter, the most frequent case."""
    if type(own) is tuple:  # (output, bias), from Megatron's linear layers
        return _apply_each(slots, module, args, kwargs, own, traced)
    adapter, base, x = slots.applied[0].adapter, slots.base, input_of(args, kwargs)
    assert adapter is not None
    assert base is not None
    marked = mark(base, x, own, traced=traced)
    output: Tensor = adapter(base, x, own)
    if marked:
        unmark(own, traced=traced)
    return output


def _apply_each(slots: Slots, module: nn.Module, args: Any, kwargs: Any, own: Any, traced: bool) -> Any:
    """Return the output after applying all active slots in order."""
    output, marked, applied = own, False, slots.applied
    # An adapter may overwrite a marked output, so do not mark it if several share it and one reads it.
    if slots.base is not None and not (len(applied) > 1 and applied[0].reads_output):
        marked = mark(slots.base, input_of(args, kwargs), own, traced=traced)
    for slot in applied:
        if slot.reads_output and output is not own:
            output = _with_change(output, own, slot(module, slots.base, args, kwargs, own))
        else:
            output = slot(module, slots.base, args, kwargs, output)
    if marked:
        unmark(own, traced=traced)
    return output


def _with_change(output: Any, own: Any, changed: Any) -> Any:
    """Return ``output`` plus an adapter's change to the base layer's own output, ``changed - own``."""
    if type(output) is tuple:
        return (_with_change(output[0], own[0], changed[0]), *output[1:])
    if own.is_floating_point():
        # An output may contain -inf, as in a head with masked classes, and -inf - -inf is NaN.
        limits = torch.finfo(own.dtype)
        own = own.clamp(limits.min, limits.max)
    return output + (changed - own)


# --- Where a model has slots ------------------------------------------------------------------------------------------


def inside(model: object) -> nn.Module:
    """Return the model inside `torch.compile` or ``nn.DataParallel``, since paths must not depend on the wrapper."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    inner = model.module if isinstance(model, nn.DataParallel) else torch_private.compiled_from(model)
    return model if inner is None else inside(inner)


def slots_of(module: nn.Module) -> Slots | None:
    """Return the slots at ``module`` itself; None if it has none."""
    slots = torch_private.own_children(module).get(CHILD)
    return slots if isinstance(slots, Slots) else None


def is_called(module: nn.Module) -> bool:
    """Whether a forward hook applies the module's adapters; False if the module's owner reads an overridden weight."""
    return torch_private.has_hook(module, apply_slots)


def places_in(model: nn.Module) -> list[tuple[str, nn.Module, Slots | None]]:
    """Return (path, module, slots) for each module of ``model`` once, in model order, without the modules of adapters.

    ``named_modules`` would also visit the adapters, which have most of a wrapped model's modules.
    """
    return torch_private.modules_outside(model, Slots, CHILD)


def base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, module) for each module of ``model`` once, in model order, without the modules of adapters."""
    return [(path, module) for path, module, _ in places_in(model)]


def walk(model: nn.Module) -> list[tuple[str, nn.Module, Slots]]:
    """Return (path, module, slots) of every adapted module of ``model``, in model order."""
    return [(path, module, slots) for path, module, slots in places_in(model) if slots is not None]


def is_merged(model: nn.Module) -> bool:
    """Return whether adapters are merged into ``model`` now."""
    return any(slots.merged for _, _, slots in walk(model))


def refuse_disabled(model: nn.Module) -> None:
    """Raise `AdapterError` inside ``with disabled(model)``."""
    for _, _, slots in walk(model):
        if not slots.enabled:
            raise AdapterError("the model's adapters are disabled; leave the block of tunerkit.disabled first")


def refuse_fixed(model: nn.Module, what: str) -> None:
    """Raise `AdapterError` if ``model`` is disabled or merged, and so does not allow the operation ``what``."""
    refuse_disabled(model)
    if is_merged(model):
        raise AdapterError(f"the model is merged; call tunerkit.unmerge before {what}")
