"""Wrap and unwrap a model: choose targets, build adapters with the method's plugin, inject them, take them out."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import TypeVar

import torch
from torch import nn

from tunerkit import hooks, injection, layers, serialization, steps, targets
from tunerkit.config import AdapterConfig, large_in, unstructure
from tunerkit.errors import ConfigError, warn
from tunerkit.injection import Progress, Tuner
from tunerkit.records import conform
from tunerkit.targets import Scan

M = TypeVar("M", bound=nn.Module)


def wrap(
    model: M,
    method: str,
    config: object = None,
    *,
    adapter: str = "default",
    seed: int | None = None,
) -> M:
    """Put an adapter into a model, in place, and freeze the base model. If this raises, the model is unchanged.

    A KeyboardInterrupt leaves the model unchanged too, unless it comes after the adapter is complete.

    The base keeps its types, parameter names and values. If the adapter adds nothing at its start, as in LoRA and
    AdaLoRA, the first output is bit-identical to the base's (with dropout off).

    Args:
        model: The model. If it has active adapters already, they stay active beside the new one.
        method: The name of an installed method, such as ``"adalora"``, in any case.
        config: The method's config: an instance of its config class, a mapping of settings, or None for the defaults.
            A plugin may also convert the config of another library, as tunerkit-peft does.
        adapter: The adapter's name: any text without "." or "/", up to 64 characters.
        seed: A 64-bit integer that makes the initial values repeatable; None uses the global random state.

    Returns:
        The same object.

    Raises:
        ConfigError: The config or the seed is invalid; the error lists every problem with its path.
        TargetError: A target cannot be found, or its module cannot be adapted; or a quantized layer does not propagate
            gradients.
        UnknownMethodError: No installed plugin provides the method.
        PluginError: The method's plugin violates the contract of a hook.
        AdapterError: The name is taken or invalid, or the model cannot take an adapter now: it is merged, disabled,
            inside DDP, FSDP or an engine of DeepSpeed, a PeftModel, or running in another thread.
    """
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**64):
        raise ConfigError([f"expected an int of 64 bits or None, got {type(seed).__name__} {seed!r} @ seed"])
    ready = injection.prepared(model, adapter, trainable=True)
    # A parameter created in inference mode cannot be trained.
    with layers.weights.new_modules_whole(), torch.inference_mode(False), ready as root:
        _wrap(root, hooks.registry.named(method), config, adapter, seed)
    return model


def _wrap(root: nn.Module, method: str, given: object, adapter: str, seed: int | None) -> None:
    hooks.registry.warn_of_rivals(method)
    config = hooks.configure(method, given, root)
    with hooks.Asking("for_model", hooks.registry.plugin_of(method), repr(type(root).__name__)):
        found = conform(config.for_model(root), type(config))
    scanned = targets.scan(root, hooks.gather_knowledge())
    targets.refuse_impassable(scanned)
    tuner = _choose(scanned, method, found, adapter)
    tuner.progress.seed = seed
    injection.refuse_idle_patterns(tuner)
    large = large_in(unstructure(found))
    around = serialization.limit_for(large, tuner.targets) if large else nullcontext
    with torch.random.fork_rng(devices=[], enabled=seed is not None):  # adapters are built on the CPU
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        slots = dict(injection.build_each(scanned, tuner, around=around))
    injection.warn_of_limits(scanned, tuner)
    targets.warn_of_unknown_packed(scanned)
    _warn_of_unserved(root, found)
    if layers.weights.may_be_sharded_later():
        serialization.note_base(tuner, scanned)
    with ExitStack() as undo:
        undo.callback(steps.unwatch_, root)
        injection.inject_(tuner, slots, scanned, undo, trainable=True)
        if hooks.watches_steps(method):
            steps.watch_(tuner)
        undo.pop_all()


def _warn_of_unserved(root: nn.Module, config: AdapterConfig) -> None:
    """Warn of features that are missing because the plugin for the model's library is not installed."""
    name, lost = type(root).__name__, []
    if config.targets is None:
        lost.append(f"the default targets of this {name} are chosen by layer type")
    elif config.targets == "all-linear":
        lost.append(f"output heads of this {name} that only its library can identify are adapted like other layers")
    if hooks.unserved(root, described=True):
        lost.append(
            f"new modules of this {name}, such as an output head, stay frozen, and files do not record its settings"
        )
    if lost and (unserved := hooks.unserved(root)):
        warn(f"{'; '.join(lost)}: {unserved}")


def _choose(scanned: Scan, method: str, config: AdapterConfig, adapter: str) -> Tuner:
    """Choose the targets of an adapter, and the modules and biases that it trains in full."""
    new = targets.find_new(scanned)
    places = [(path, slots) for path, _, slots in injection.walk(scanned.root.module)]
    named = targets.choose_copies(scanned, config.train_modules)
    targets.refuse_tied(scanned, named)
    added = targets.choose_new(
        scanned,
        new,
        named,
        targets=config.targets,
        exclude=config.exclude,
        adapted={path for path, slots in places if slots.active or not slots.copies},
    )
    chosen = targets.select(
        scanned,
        targets=config.targets,
        exclude=config.exclude,
        layers=config.layers,
        trained=named,
        new=added,
        method=hooks.registry.get(method),
    )
    copies = (*named, *added)
    copied = [path for path, slots in places if not slots.copies.keys().isdisjoint(slots.active)]
    return Tuner(
        name=adapter,
        method=method,
        config=config,
        model=scanned.root.module,
        targets=chosen,
        copies=targets.from_paths(scanned, copies),
        biases=targets.choose_biases(scanned, config.bias, chosen, copies),
        progress=Progress(total_steps=config.total_steps, beside=targets.trained_elsewhere(new, copied)),
    )


def unwrap(model: M, *, keep_merged: bool = False, dtype: torch.dtype | None = None) -> M:
    """Take every adapter out of a model, and detach it from its optimizer.

    A warning is given if that undoes a merge. If this raises, even after a KeyboardInterrupt, either all adapters are
    still in the model, which is merged or not as before, or none is.

    Args:
        model: The wrapped model.
        keep_merged: Whether to merge the active adapters into the weights first. By default the base is restored
            exactly, even if the model is merged.
        dtype: If given, quantized layers are replaced by dense layers of this dtype. With ``keep_merged`` these have
            W + ΔW, rounded only to this dtype; the quantized layers need not support writing.

    Returns:
        The same object, without adapters.

    Raises:
        AdapterError: The model has no adapter, is disabled, runs in another thread, cannot be merged, or was merged
            with ``permanent=True``, so that the base cannot be restored.
        ConfigError: ``dtype`` is not a floating-point dtype.
    """
    if dtype not in (None, *_DENSE):
        raise ConfigError([f"expected {' or '.join(map(str, _DENSE))}, got {dtype!r} @ dtype"])
    tuners = list(injection.require_tuners(model).values())
    injection.refuse_disabled(model)
    root = tuners[0].model
    injection.refuse_running(root, "unwrapping")
    was_merged, places = injection.is_merged(root), injection.walk(root)
    if dtype is not None:
        injection.refuse_lost(tuners)
    if keep_merged and not was_merged:
        serialization.refuse_unmergeable(root)
    if was_merged and not keep_merged:
        serialization.refuse_permanent(places)
        warn(_UNDONE)
    dense: dict[str, nn.Module] = {}
    if dtype is not None:
        # Computed from the unmerged W, so that a dense W + ΔW has no quantization error of the merge.
        permanent = any(slots.permanent for _, _, slots in places)
        with nullcontext() if permanent else serialization.disabled(root):
            dense = serialization.dense_layers(tuners[0], dtype, merged=keep_merged)
    with ExitStack() as undo:
        if keep_merged and not was_merged:
            undo.callback(serialization.restore_originals_, root)
            serialization.merge_except_(root, dense)
        # From here on an interrupt completes the call, since `detach` cannot be undone.
        injection.completed(_take_out_, tuners, dense, keep_merged)
        undo.pop_all()
    return model


def _take_out_(tuners: Sequence[Tuner], dense: Mapping[str, nn.Module], keep_merged: bool) -> None:
    """Restore the originals (or keep the merged weights), then remove the adapters and their attachments."""
    if not keep_merged:
        serialization.restore_originals_(tuners[0].model)
    for tuner in tuners:
        steps.detach(tuner)
    injection.eject_(tuners)
    steps.unwatch_(tuners[0].model)
    serialization.replace_by_dense_(tuners[0].model, dense)


_DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_UNDONE = (
    "unwrap undoes the merge: the model is the base model again. For a plain model with the merged weights, call "
    "tunerkit.unwrap(model, keep_merged=True) instead"
)
