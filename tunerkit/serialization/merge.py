"""Merge adapters into their base layers, unmerge them exactly, and disable them to show the base model."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit import hooks, injection
from tunerkit.errors import AdapterError
from tunerkit.injection import Slots
from tunerkit.layers import bias_name, torch_private, weights
from tunerkit.paths import few, join
from tunerkit.records import Rounding
from tunerkit.serialization.fingerprint import fingerprint
from tunerkit.serialization.packed_layers import requiring_effect, warn_of_rounding
from tunerkit.serialization.tensor_checks import nonfinite
from tunerkit.serialization.untying import Parting, Places, plan_parting

M = TypeVar("M", bound=nn.Module)


def merge(model: M, *, permanent: bool = False) -> M:
    """Add every active adapter to its base layer's weights, in place. A forward pass then costs as much as the base's.

    While merged, `disabled` shows the base model, saving works, and an optimizer step raises `StepError`. The model's
    ``state_dict()`` has both the merged weights and the adapters. For unmerged weights, call `unmerge` first; for
    merged weights without adapters, ``unwrap(model, keep_merged=True)``. An unmerged model rejects a merged state
    dict, since the adapters would be applied twice. A merged model rejects every state dict.

    Adapted modules that share a weight are untied, since their merged weights differ. Each gets its own parameter, and
    ``config.tie_word_embeddings`` becomes False, so that ``save_pretrained`` writes all of them. `unmerge` and
    `disabled` restore the shared Parameter object and the setting.

    A quantized weight is dequantized, and the sum is quantized again in the same way. `rounding` lists the errors, and
    a warning reports them for weights of at most 4 bits.

    No forward may run in another thread while the weights change: guard both with one lock. A running forward raises
    an error if it is detected. If this raises, nothing is changed, even after a KeyboardInterrupt.

    Args:
        model: The wrapped model.
        permanent: Whether to discard the original weights. By default they are kept, so that `unmerge` restores them
            exactly; the adapted weights then take twice their memory.

    Returns:
        The same object.

    Raises:
        AdapterError: The model is already merged or disabled, or runs in another thread; no adapter is active; weights
            are offloaded, sharded (FSDP, ZeRO-3), or packed in a way that ignores additions; a forward hook runs before
            the adapters, since it was registered with ``prepend=True`` after wrapping; adapted modules were replaced,
            resized or tied after wrapping; a packed weight is tied or cannot be written; an adapter adds a bias to a
            base layer without one; a method does not implement ``tunerkit_delta``; or merged weights contain NaN or
            inf.
        TargetError: The model was quantized by torchao after wrapping.
        PluginError: A method returns an invalid delta.
    """
    refuse_unmergeable(model)
    merge_except_(model, (), permanent=permanent)
    return model


def merge_except_(model: nn.Module, paths: Collection[str], *, permanent: bool = False) -> None:
    """Merge the active adapters, except at ``paths``. Call `refuse_unmergeable` first."""
    # Never in inference mode: inference tensors in the base could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        tuners = injection.require_tuners(model)
        places = [place for place in injection.walk(model) if place[0] not in paths]
        merged = _merged_tensors(places)
        plans = plan_parting(model, places, merged)
        kept = {name: fingerprint(tuner) for name, tuner in tuners.items()} if permanent else {}
        changes = [
            _Change(path, module, slots, tensors, _values(module, slots, tensors), plan)
            for (path, module, slots), tensors, plan in zip(places, merged, plans, strict=True)
        ]
        noted: list[Rounding] = []
        with ExitStack() as undo:
            for each in changes:
                undo.callback(_put_back_, each.module, each.slots, each.originals, each.parting)
                with requiring_effect(each.path, each.slots, each.merged, noted):
                    each.slots.parting = each.parting
                    _write_(each.module, each.slots, each.merged, apart=True)
            for each in changes:
                each.slots.set_aside({} if permanent else each.originals)
                each.slots.permanent = permanent
                each.slots.merged = each.slots.active
                each.slots.parting = None if permanent else each.parting
            for name, base in kept.items():
                undo.callback(setattr, tuners[name].progress, "fingerprint", None)
                tuners[name].progress.fingerprint = base
            warn_of_rounding(noted)
            undo.pop_all()


def unmerge(model: M) -> M:
    """Restore the original weights exactly.

    Args:
        model: The merged model.

    Returns:
        The same object.

    Raises:
        AdapterError: The model is not merged, it is disabled, it runs in another thread, or it was merged with
            ``permanent=True``.
    """
    injection.require_tuners(model)
    injection.refuse_disabled(model)
    if not injection.is_merged(model):
        raise AdapterError("the model is not merged; there is nothing to unmerge")
    injection.refuse_running(injection.wrapped_model(model), "unmerging")
    restore_originals_(model)
    return model


def restore_originals_(model: nn.Module) -> None:
    """Undo a merge, if there is one. A KeyboardInterrupt is raised only after all originals are restored."""
    weights.reshard_(model)
    places = injection.walk(model)
    refuse_permanent(places)

    def restore_() -> None:
        for _, module, slots in places:
            if slots.merged:
                _put_back_(module, slots, slots.originals, slots.parting)

    injection.completed(restore_)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Show the base model inside a ``with`` block: without adapters, trained copies, trained biases or merged weights.

    Args:
        model: The wrapped model, merged or not.

    Raises:
        AdapterError: The model has no adapter, runs in another thread, or was merged with ``permanent=True``.
    """
    injection.require_tuners(model)
    places = [place for place in injection.walk(model) if place[2].enabled]
    refuse_permanent(places)
    if places:
        injection.refuse_running(injection.wrapped_model(model), "disabling adapters")
    weights.reshard_(model)
    with ExitStack() as again, ExitStack() as back:
        again.callback(_enable_, places, True)  # a KeyboardInterrupt may interrupt `back`; else this does nothing
        back.callback(_enable_, places, True)
        back.callback(weights.reshard_, model)
        _enable_(places, False)
        yield


def _enable_(places: Places, enabled: bool) -> None:
    """Enable or disable adapters; in merged modules, swap the merged and the original values and ties.

    A KeyboardInterrupt is raised only after the swap: until then, only local variables have the replaced values.
    """
    turned = [(module, slots, slots.originals) for _, module, slots in places if slots.enabled is not enabled]
    exchanged = [(module, slots, shown, _values(module, slots, shown)) for module, slots, shown in turned]

    def show_() -> None:
        for module, slots, shown, hidden in exchanged:
            if slots.merged:
                _write_(module, slots, shown, apart=enabled)
                slots.set_aside(hidden)
            slots.enabled = enabled

    injection.completed(show_)


# --- What cannot be merged -------------------------------------------------------------------------------------------


def refuse_unmergeable(model: nn.Module) -> None:
    """Raise an error for the first reason why the active adapters cannot be merged now."""
    tuners = injection.require_tuners(model)
    weights.reshard_(model)  # weights that a forward left gathered look unsharded
    injection.refuse_disabled(model)
    if injection.is_merged(model):
        raise AdapterError("the model is merged already; call tunerkit.unmerge first")
    places = [place for place in injection.walk(model) if place[2].active]
    if not places:
        raise AdapterError("no adapter is active, so nothing can be merged; call tunerkit.activate first")
    injection.refuse_running(injection.wrapped_model(model), "merging")
    # Checked first: weights that were packed after wrapping may not be readable.
    injection.refuse_restricted([place[:2] for place in places if not _is_packed(place[2])], "merge")
    for path, module, slots in places:
        if (reason := next(_obstacles(module, slots), None)) is not None:
            error = AdapterError(f"cannot merge into {path!r}: {reason}")
            holder = weights.offloading(module) or weights.lender(module) or weights.sharding(module.parameters())
            raise hooks.because_of(holder, hooks.specs.tunerkit_holdings, error)
    injection.refuse_lost(tuners.values())


def _obstacles(module: nn.Module, slots: Slots) -> Iterator[str]:
    """Yield the reasons why nothing can be merged into a module now (sentence fragments)."""
    kind, held = type(module).__name__, slots.holder(module)
    if (holder := weights.offloading(held)) is not None:
        yield f"{holder.name} offloads its weights; {holder.way_out}, which loads them, and then merge"
    for hook in torch_private.hooks_before(module, injection.apply_slots):
        yield (
            f"its forward hook {getattr(hook, '__qualname__', type(hook).__name__)} runs before the adapters, since it "
            "was registered with prepend=True after tunerkit.wrap, so a merge would change the output that it gets. "
            "Remove it, merge, and register it again; or register it without prepend"
        )
    if slots.base is not None and any(own.is_meta for own in held.parameters(recurse=False)):
        yield "its weight is on the meta device; load the weights first"
    if (holder := weights.lender(held)) is not None:
        yield str(holder.lent(held))
    if _is_packed(slots) and (holder := weights.sharding(held.parameters())) is not None:
        yield (
            f"its quantized weight is sharded by {holder.name}, and a single shard cannot be dequantized. Save the "
            "adapter, load it onto the base in one process, and merge there"
        )
    adapted = [slot for slot in slots.applied if slot.adapter is not None]
    for slot in adapted:
        if not hooks.has_delta(slot.method):
            yield (
                f"method {slot.method!r} cannot be merged: its plugin implements neither tunerkit_delta nor "
                "tunerkit_factors"
            )
        if slots.base is not None and not slots.base.has_weight:
            yield f"method {slot.method!r} changes the output of a {kind}, whose weight tunerkit does not know"
    readers = dict.fromkeys(repr(slot.method) for slot in adapted if slot.reads_output)
    if readers and isinstance(module, nn.Embedding) and injection.is_called(module) and _has_padding(module):
        yield (
            f"its padding row is not zero, and a delta never changes that row, but method {' or '.join(readers)} reads "
            f"the output there: the merged {kind} and the adapted one would have different outputs. If the adapter "
            "class only adds to the output, set its reads_output = False; otherwise leave this module out of the "
            "targets (exclude=...)"
        )


def _has_padding(embedding: nn.Embedding) -> bool:
    """Whether the embedding has a padding row that is not zero."""
    if embedding.padding_idx is None:
        return False
    with weights.gathered(embedding):
        return bool(embedding.weight[embedding.padding_idx].any())


def refuse_permanent(places: Places) -> None:
    """Raise `AdapterError` if a merge discarded the originals."""
    if any(slots.permanent for _, _, slots in places):
        raise AdapterError(
            "the model was merged with permanent=True, which keeps no originals of the base's weights, so they cannot "
            "be restored. tunerkit.unwrap(model, keep_merged=True) takes the adapters out; for the base itself, load "
            "the base model again"
        )


# --- The tensors of a module -----------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Change:
    """The merge of one module: its merged and original tensors, by local name."""

    path: str
    module: nn.Module
    slots: Slots
    merged: dict[str, Any]
    originals: dict[str, Any]
    parting: Parting | None


def _merged_tensors(places: Places) -> list[dict[str, Any]]:
    """Compute the merged tensors of each module, by local name; for a sharded tensor, this process's shard."""
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for path, module, slots in places:
        with weights.gathered(slots.holder(module)) as part:
            tensors = injection.adapted_tensors(path, module, slots)
            bias = None if slots.base is None else slots.base.bias_name
            if bias in tensors and torch_private.own_parameters(slots.holder(module)).get(bias) is None:
                raise AdapterError(f"cannot merge into {path!r}: the adapter adds a bias and the base layer has none")
            # Packed ones were checked by `BaseLayer.merged` before they were packed.
            plain = {name: tensor for name, tensor in tensors.items() if not _is_stored(slots, name)}
            wrong += [join(path, name) for name in nonfinite(plain, _own_tensors(slots.holder(module)))]
            found.append({name: part(name, tensor) for name, tensor in tensors.items()})
    if wrong:
        raise AdapterError(
            f"cannot merge: {len(wrong)} merged tensors would contain NaN or inf: {few(wrong, shown=5)}. Nothing was "
            "changed. Either the adapter's own weights are not finite, or the sums are too large for the base's dtype: "
            "then convert the model first, for example with model.float() or model.bfloat16()"
        )
    return found


def _put_back_(module: nn.Module, slots: Slots, originals: dict[str, Any], parting: Parting | None) -> None:
    """Undo a complete or partial merge of one module."""
    slots.parting = parting
    _write_(module, slots, originals, apart=False)
    slots.forget_merge()


def _write_(module: nn.Module, slots: Slots, values: dict[str, Any], *, apart: bool) -> None:
    """Untie a module's parameters (``apart``) or tie them again, then write values to its parameters and buffers.

    The Parameter objects stay the same, except for those with packed weights, which are replaced. Ties are restored
    before the values, since the originals belong in the shared parameters.
    """
    if slots.parting is not None:
        slots.parting.set_(apart=apart)
    own = _own_tensors(slots.holder(module))
    for name, value in values.items():
        if _is_stored(slots, name):
            assert slots.base is not None
            slots.base.put_({name: value})
        elif (part := weights.part_of(own[name])) is not None:  # in place, since an engine gathers from this storage
            part.copy_(value)
        else:
            own[name].data = value


def _values(module: nn.Module, slots: Slots, names: Iterable[str]) -> dict[str, Any]:
    """Return the current values of ``names``, to restore them later; shards are copied, as merging overwrites them."""
    own = _own_tensors(slots.holder(module))
    found: dict[str, Any] = {}
    for name in names:
        if _is_stored(slots, name):
            found[name] = getattr(slots.holder(module), name)
        else:
            part = weights.part_of(own[name])
            found[name] = own[name].data if part is None else part.clone()
    return found


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    named: Iterable[tuple[str, Tensor]] = module.named_parameters(remove_duplicate=False)
    return {**dict(module.named_buffers(remove_duplicate=False)), **dict(named)}


def _is_packed(slots: Slots) -> bool:
    """Whether the module's weight is packed by a quantizer."""
    return slots.base is not None and slots.base.packing is not None


def _is_stored(slots: Slots, name: str) -> bool:
    """Whether attribute ``name`` stores a packed weight, so that a merge replaces the object and not its values."""
    return _is_packed(slots) and name != bias_name(slots.base)
