"""Merge adapters into their base layers, unmerge them exactly, and show the base model while adapters stay in."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tunerkit import injection, layers
from tunerkit.errors import AdapterError
from tunerkit.injection import Slots
from tunerkit.layers import weights
from tunerkit.paths import few, join
from tunerkit.records import Rounding
from tunerkit.serialization.fingerprint import fingerprint
from tunerkit.serialization.packed import is_reached, is_whole, wanted_sum, warn_of_rounding
from tunerkit.serialization.tensor_checks import nonfinite
from tunerkit.serialization.untying import (
    Parting,
    Places,
    forget_parting,
    note_parting,
    parting_of,
    plan_parting,
    refuse_left_out,
    thaw_parted,
)

M = TypeVar("M", bound=nn.Module)


def merge(model: M, *, permanent: bool = False) -> M:
    """Add every active adapter to its base layer's weights, in place. A forward pass then costs as much as the base's.

    While merged, `disabled` shows the base model, saving works, and an optimizer step raises `StepError`. The model's
    own ``state_dict()`` contains the merged weights and also the adapters. To get only one of them, take it after
    `unmerge`, or after ``unwrap(model, keep_merged=True)``. A state with merged weights cannot be loaded into an
    unmerged model, where the adapters would be applied twice, and none can be loaded while the model is merged.

    Where all modules that share a weight are adapted, each needs another sum, so merging unties them. They get
    parameters of their own, and ``config.tie_word_embeddings`` becomes False, so that ``save_pretrained`` writes all of
    them. `unmerge` and `disabled` put the shared Parameter object and the setting back.

    No forward may run in another thread while the weights change: use one lock for both. A forward that is seen to
    run is an error.

    A weight that a quantiser stores is dequantised, and the sum is quantised again in the same way. `rounding` lists
    what that rounds, and a warning says it for weights of 4 bits and less.

    If this raises, also a KeyboardInterrupt in the middle, nothing is changed.

    Args:
        model: The wrapped model.
        permanent: Whether to discard the original weights. By default they are kept, so that `unmerge` restores them
            exactly; the adapted weights then take twice their memory.

    Returns:
        The same object.

    Raises:
        AdapterError: The model is already merged or disabled, or runs in another thread; no adapter is active; weights
            are offloaded, sharded (FSDP, ZeRO-3) or packed, so that adding to them has no effect; a forward hook runs
            before the adapters, since it was registered with ``prepend=True`` after wrapping; adapted modules were
            replaced, resized or tied after wrapping; a packed weight is tied; a kind cannot write a packed weight; a
            base layer has no place for a bias; a method does not implement ``tunerkit_delta``; or merged weights
            contain NaN or inf.
        TargetError: The model was quantised by torchao after wrapping.
        PluginError: A method returns an invalid delta.
    """
    return merge_except_(model, (), permanent=permanent)


def merge_except_(model: M, paths: Collection[str], *, permanent: bool = False) -> M:
    """Merge as `merge` does, without the modules at ``paths``."""
    tuners = injection.require_tuners(model)
    weights.reshard_(model)
    places = [place for place in injection.walk(model) if place[0] not in paths]
    _refuse_unfit(model, places)
    merged = [_merged_parts(*place) if _is_split(place[1]) else _merged_tensors(*place) for place in places]
    refuse_left_out(model, places, merged)
    whole = [not _is_split(module) for _, module, _ in places]
    _refuse_nonfinite(list(compress(places, whole)), list(compress(merged, whole)))
    kept = {name: fingerprint(tuner) for name, tuner in tuners.items()} if permanent else {}
    plans = plan_parting(model, places, merged)
    thaw_parted(model, plans)
    originals = [_values(module, slots, tensors) for (_, module, slots), tensors in zip(places, merged, strict=True)]
    try:
        noted = _replace_all_(places, merged, plans)
        for (_, _, slots), own, plan in zip(places, originals, plans, strict=True):
            note_parting(slots, None if permanent else plan)
            slots.note_merged({} if permanent else own, permanent=permanent)
        for name, base in kept.items():
            tuners[name].progress.fingerprint = base
        warn_of_rounding(noted)
    except BaseException:
        for (_, module, slots), own, plan in zip(places, originals, plans, strict=True):
            _put_back_(module, slots, own, plan)
        for tuner in tuners.values():
            tuner.progress.fingerprint = None
        raise
    return model


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
    """Undo a merge if there is one. If this is interrupted, it is undone all the same before it raises."""
    weights.reshard_(model)
    places = list(injection.walk(model))
    refuse_permanent(places)
    try:
        _restore_originals_(places)
    except BaseException:
        _restore_originals_(places)
        raise


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
    try:
        try:
            _enable_(places, False)
            yield
        finally:
            weights.reshard_(model)
            _enable_(places, True)
    except BaseException:  # it may be a KeyboardInterrupt on the way back
        _enable_(places, True)
        raise


def _restore_originals_(places: Places) -> None:
    """Undo a merge, or what is left of it."""
    for _, module, slots in places:
        if slots.merged:
            _put_back_(module, slots, slots.originals, parting_of(slots))
        forget_parting(slots)


def _put_back_(module: nn.Module, slots: Slots, originals: dict[str, Tensor], plan: Parting | None) -> None:
    """Undo the merge of one module: its ties first, since the originals belong into the shared parameters."""
    if plan is not None:
        plan.tie_()
    _replace_(module, slots, originals)
    slots.forget_merge()
    forget_parting(slots)


def _enable_(places: Places, enabled: bool) -> None:
    """Switch adapters on or off; where they are merged, exchange the merged and the original values and ties.

    What has begun is completed before an interrupt raises: the values of both sides exist only here then.
    """
    turned = [place for place in places if place[2].enabled is not enabled]
    shown = [slots.originals for _, _, slots in turned]
    hidden = [_values(module, slots, values) for (_, module, slots), values in zip(turned, shown, strict=True)]
    try:
        for (_, module, slots), values, others in zip(turned, shown, hidden, strict=True):
            _show_(module, slots, values, others, enabled=enabled)
    except BaseException:
        for (_, module, slots), values, others in zip(turned, shown, hidden, strict=True):
            _show_(module, slots, values, others, enabled=enabled)
        raise


def _show_(module: nn.Module, slots: Slots, shown: dict[str, Any], hidden: dict[str, Any], *, enabled: bool) -> None:
    """Switch the adapters of one module on or off. It may be repeated after an interrupt."""
    if slots.merged:
        if (plan := parting_of(slots)) is not None:
            plan.part_() if enabled else plan.tie_()
        _replace_(module, slots, shown)
        slots.set_aside(hidden)
    slots.enabled = enabled


def refuse_unmergeable(model: nn.Module) -> None:
    """Raise `AdapterError` if the active adapters cannot be merged now, whatever is merged in their place."""
    _refuse_unfit(model, list(injection.walk(model)))


def _refuse_unfit(model: nn.Module, places: Places) -> None:
    """Raise the error of the first reason why nothing can be merged now."""
    injection.refuse_disabled(model)
    if injection.is_merged(model):
        raise AdapterError("the model is merged already; call tunerkit.unmerge first")
    if not any(slots.active for _, _, slots in places):
        raise AdapterError("no adapter is active, so nothing can be merged; call tunerkit.activate first")
    injection.refuse_running(injection.wrapped_model(model), "merging")
    _refuse_offloaded(places)
    _refuse_earlier_hooks(places)
    unpacked = [(path, module) for path, module, slots in places if slots.active and not _has_packed_weight(slots)]
    injection.refuse_restricted(unpacked, "merge")
    _refuse_unreachable(places)
    injection.refuse_lost(injection.require_tuners(model).values())


def _refuse_offloaded(places: Places) -> None:
    """Raise `AdapterError` if weights are loaded for each forward pass only: merged values would be lost."""
    away = [(path, holder) for path, module, _ in places if (holder := weights.offloading(module)) is not None]
    if away:
        raise AdapterError(
            f"{away[0][1].name} offloads the weights of {len(away)} adapted layers ({away[0][0]}, ...), so nothing can "
            f"be merged into them; {away[0][1].way_out}, which loads them, and then merge"
        )


def _refuse_unreachable(places: Places) -> None:
    """Raise `AdapterError` if what is merged into weights would be lost, or if packed ones are divided."""
    for path, module, slots in places:
        if slots.active and slots.base is not None and any(own.is_meta for own in module.parameters(recurse=False)):
            raise AdapterError(f"cannot merge into {path!r}: its weight is on the meta device; load the weights first")
        if (reason := weights.lent(module)) is not None:
            raise AdapterError(f"cannot merge into {path!r}: {reason}")
        if slots.active and _has_packed_weight(slots) and (holder := weights.sharding(module.parameters())) is not None:
            raise AdapterError(
                f"cannot merge into {path!r}: its weight is quantised, and {holder.name} has cut it into shards, which "
                "cannot be read alone. Save the adapter, load it onto the base in one process, and merge there"
            )


def _has_packed_weight(slots: Slots) -> bool:
    """Whether a quantiser stores the weight of a module: its library can read and write whole ones alone."""
    return slots.base is not None and slots.base.packing is not None


def _is_split(module: nn.Module) -> bool:
    return weights.sharding(module.parameters()) is not None


def _refuse_earlier_hooks(places: Places) -> None:
    """Raise `AdapterError` if a hook sees a layer's output without the adapters, which a merge would show to it."""
    for path, module, slots in places:
        for hook in layers.torch_private.hooks_before(module, injection.apply_slots) if slots.active else ():
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise AdapterError(
                f"cannot merge into {path!r}: its forward hook {name} runs before the adapters, as it was "
                "registered with prepend=True after tunerkit.wrap. It would get another output. Remove it, merge, and "
                "register it again; or register it without prepend"
            )


def _refuse_nonfinite(places: Places, merged: Sequence[Mapping[str, Any]]) -> None:
    """Raise `AdapterError` if merged weights contain NaN or inf and the module's own do not."""
    pairs = list(zip(places, merged, strict=True))
    tensors = {
        join(path, name): tensor
        for (path, _, slots), own in pairs
        for name, tensor in own.items()
        if not is_whole(slots, name)  # `BaseLayer.merged` has looked at it before it was packed
    }
    if wrong := nonfinite(tensors):
        live = {join(path, name): t.detach() for path, module, _ in places for name, t in _own_tensors(module).items()}
        wrong = nonfinite({name: tensors[name] for name in wrong}, live)
    if wrong:
        raise AdapterError(
            f"cannot merge: {len(wrong)} merged tensors would contain NaN or inf: {few(wrong, shown=5)}. Nothing was "
            "changed. Either the adapter's own weights are not finite, or the sums are too large for the base's dtype: "
            "then convert the model first, for example with model.float() or model.bfloat16()"
        )


def refuse_permanent(places: Places) -> None:
    """Raise `AdapterError` if a merge kept no originals."""
    if any(slots.permanent for _, _, slots in places):
        raise AdapterError(
            "the model was merged with permanent=True, which kept no originals; the base cannot be shown again. "
            "Use tunerkit.unwrap(model, keep_merged=True) to take the adapters out, or load the base model again"
        )


def _merged_parts(path: str, module: nn.Module, slots: Slots) -> dict[str, Any]:
    """Return this process's part of the merged tensors. The whole ones are checked, in all processes alike."""
    with weights.gathered(module) as part:
        tensors = _merged_tensors(path, module, slots)
        _refuse_nonfinite([(path, module, slots)], [tensors])
        return {name: part(name, tensor) for name, tensor in tensors.items()}


# Never in inference mode: inference tensors in the base could not be trained later.
@torch.inference_mode(False)
@torch.no_grad()
def _merged_tensors(path: str, module: nn.Module, slots: Slots) -> dict[str, Any]:
    """Return ``module``'s own tensors with all active slots merged, by name. Raises `AdapterError` if it cannot."""
    injection.refuse_without_delta(slots)
    for slot in slots.applied:
        if slot.adapter is not None and slots.base is not None and not slots.base.has_weight:
            raise AdapterError(
                f"cannot merge into {path!r}: method {slot.method!r} changes the output of a {type(module).__name__}, "
                "of which tunerkit knows no weight"
            )
    _refuse_readers_of_padding(path, module, slots)
    tensors = injection.adapted_tensors(path, module, slots)
    bias = None if slots.base is None else slots.base.bias_name
    if bias in tensors and layers.torch_private.own_parameters(module).get(bias) is None:
        raise AdapterError(f"cannot merge into {path!r}: the adapter adds a bias and the base layer has none")
    return tensors


def _refuse_readers_of_padding(path: str, module: nn.Module, slots: Slots) -> None:
    """Raise `AdapterError` if adapters change what the padding row of an embedding gives, which no delta does."""
    if not isinstance(module, nn.Embedding) or module.padding_idx is None or not injection.is_called(module):
        return
    readers = dict.fromkeys(
        repr(slot.method) for slot in slots.applied if slot.adapter is not None and slot.reads_output
    )
    if readers and module.weight[module.padding_idx].any():
        raise AdapterError(
            f"cannot merge at {path!r}: the merged {type(module).__name__} computes something else than the adapted "
            f"one for its padding, whose row is not zero. Method {' or '.join(readers)} reads the output there, and a "
            "delta never changes that row. A class that only adds to the output should set reads_output = False; if it "
            "does more, leave this module out of the targets (exclude=...)"
        )


def _replace_all_(places: Places, merged: Sequence[dict[str, Any]], plans: Sequence[Parting | None]) -> list[Rounding]:
    """Give every module its merged tensors, and parameters of its own where it shares them.

    Returns:
        What that has rounded in packed weights.

    Raises:
        AdapterError: A weight does not become what was written.
    """
    noted: list[Rounding] = []
    for plan in plans:
        if plan is not None:
            plan.part_()
    for (path, module, slots), tensors in zip(places, merged, strict=True):
        wanted = None if _is_split(module) else wanted_sum(path, slots, tensors)
        _replace_(module, slots, tensors)
        if wanted is not None and not is_reached(slots, *wanted, noted):
            raise AdapterError(
                f"cannot merge into {path!r}: its {type(module).__name__} stores the weight in a packed form, and "
                "adding to it had no effect. Load the adapter onto the base in full precision and merge there"
            )
    return noted


def _replace_(module: nn.Module, slots: Slots, tensors: dict[str, Any]) -> None:
    """Give a module's parameters and buffers new values in other storage. The Parameter objects stay the same.

    Only what holds a packed weight is replaced itself.
    """
    own = _own_tensors(module)
    for name, tensor in tensors.items():
        if is_whole(slots, name):
            assert slots.base is not None
            slots.base.put_({name: tensor})
        elif (part := weights.part_of(own[name])) is not None:  # in the same storage, which an engine gathers from
            part.copy_(tensor)
        else:
            own[name].data = tensor


def _values(module: nn.Module, slots: Slots, names: Iterable[str]) -> dict[str, Any]:
    """Return the values that a module's parameters and buffers have now: of shards, written in place, a copy."""

    def value(name: str) -> Any:
        if is_whole(slots, name):
            return getattr(module, name)
        part = weights.part_of(own[name])
        return own[name].data if part is None else part.clone()

    own = _own_tensors(module)
    return {name: value(name) for name in names}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    own.update(module.named_parameters(remove_duplicate=False))
    return own
