"""Refuse an adapter name or a model that cannot take an adapter, before anything is built."""

import warnings
from collections.abc import Collection, Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from tunerkit.config import AdapterConfig
from tunerkit.errors import AdapterError, ConfigError, TunerkitWarning, closest
from tunerkit.injection.inject import Plan
from tunerkit.injection.merged_state import refuse_disabled, refuse_merged
from tunerkit.injection.slots import base_modules, slots_of, walk
from tunerkit.injection.tuner import tuners_of
from tunerkit.libraries import torch_private
from tunerkit.paths import CHILD, is_under, join
from tunerkit.patterns import matches
from tunerkit.records import Target
from tunerkit.targets import Scan


def refuse_idle_patterns(config: AdapterConfig, chosen: tuple[Target, ...]) -> None:
    """A per-target setting that reaches no target is a mistake, most often a mistyped name."""
    paths = [target.path for target in chosen]
    names = {path.rpartition(".")[2] for path in paths}
    problems = [
        f"{pattern!r} matches none of the {len(paths)} targets{closest(pattern, names)} @ $.{field}"
        for pattern, field in config.target_patterns()
        if not any(matches(pattern, path) for path in paths)
    ]
    if problems:
        raise ConfigError(problems)


def warn_of_statistics(scanned: Scan, copies: tuple[str, ...]) -> None:
    """Tell of norms in the frozen base whose statistics training moves all the same: an adapter's file lacks them."""
    moving = [
        each.path
        for each in (scanned.root, *scanned.modules)
        if torch_private.has_statistics(each.module)
        and each.module.track_running_stats
        and each.module.running_mean is not None
        and not is_under(each.path, copies)
    ]
    if moving:
        warnings.warn(
            f"{len(moving)} normalisation layers of the frozen base ({moving[0]}, ...) move their running statistics "
            "in training mode; the adapter's file does not hold them. Put them in eval mode while training, or name "
            "them in train_modules",
            TunerkitWarning,
            stacklevel=3,
        )


def warn_of_dropout(plan: Plan) -> None:
    """Tell of targets whose input is seen by nobody: the adapter's dropout cannot be applied there."""
    tuner = plan.tuner
    unseen = [target.path for target in tuner.targets if plan.places[target.path].reader is not None]
    if unseen and tuner.config.dropout:
        warnings.warn(
            f"dropout is not applied at {len(unseen)} targets ({unseen[0]}, ...): their owner reads the weight past "
            "the layer's forward, so the adapter changes the weight and never sees an input. Set dropout to 0 or "
            "exclude them if that matters",
            TunerkitWarning,
            stacklevel=3,
        )


def refuse_overlap(model: nn.Module, paths: Collection[str], copies: Collection[str]) -> None:
    """A module trained in full must not hold, lie in, or be another adapter's place: their outputs would fight.

    Several adapters may each train a copy of one module, where none of the others is active.
    """
    for path, _, slots in walk(model):
        owners = ", ".join(repr(name) for name in slots.names)
        shared = path in copies and slots.copying == slots.names
        for copied in copies:
            if _nested(path, copied) and not shared:
                raise AdapterError(f"cannot train {copied!r} in full: adapter {owners} is at {path!r}; delete it first")
        for wanted in paths:
            if slots.copying and _nested(path, wanted) and not shared:
                raise AdapterError(f"cannot adapt {wanted!r}: adapter {owners} trains {path!r} in full")
        if shared and slots.active:
            raise AdapterError(
                f"cannot train {path!r} in full: adapter {slots.active[0]!r} does and is active, and one replaces the "
                "other; call tunerkit.activate(model, []) first, then activate the one that is wanted"
            )


def refuse_rivals(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to activate two adapters together that train the same module in full."""
    for path, _, slots in walk(model):
        rivals = [name for name in names if name in slots.copying]
        if len(rivals) > 1:
            raise AdapterError(
                f"adapters {rivals[0]!r} and {rivals[1]!r} both train {path!r} in full, and one replaces the other; "
                "activate one of them at a time"
            )


def _nested(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


_NAME_LIMIT = 64


def check_name(adapter: object) -> None:
    """Adapter names become a part of parameter names, hence the limits."""
    if not isinstance(adapter, str) or not 1 <= len(adapter) <= _NAME_LIMIT or "." in adapter or "/" in adapter:
        raise AdapterError(
            f"adapter name {adapter!r}: expected 1 to {_NAME_LIMIT} characters without '.' and '/', choose another"
        )
    if any("\ud800" <= character <= "\udfff" for character in adapter):
        raise AdapterError(
            f"adapter name {adapter!r} holds half of a surrogate pair, and so would the names of its parameters: no "
            "file can hold them; choose another"
        )


def refuse_taken(names: Collection[str], adapter: str) -> None:
    """Refuse a name that another adapter of the model has."""
    if adapter in names:
        raise AdapterError(f"the model has an adapter named {adapter!r} already; choose another, or delete that one")


def refuse_unready(model: nn.Module, adapter: str) -> None:
    """Refuse a model that cannot take another adapter now."""
    own = tuple(base_modules(model))
    parameters = (
        (join(path, name), p) for path, module in own for name, p in torch_private.own_parameters(module).items()
    )
    lazy = [name for name, parameter in parameters if issubclass(type(parameter), UninitializedParameter)]
    if lazy:
        raise AdapterError(f"the model has parameters without a shape yet ({lazy[0]}, ...); run one batch first")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise AdapterError("the model is already inside DistributedDataParallel; wrap it first, then put it into DDP")
    tuners = tuners_of(model)
    root = next((other.model for other in tuners.values()), None)
    if root is not model and (tuners or next(walk(model), None) is not None):
        whole = f"the {type(root).__name__} inside it" if root is not None else "the model that it is a part of"
        raise AdapterError(f"{whole} has adapters already; wrap that one, so that one model holds them all")
    foreign = [path for path, module in own if hasattr(module, CHILD) and slots_of(module) is None]
    if foreign:
        raise AdapterError(
            f"the model has an attribute {CHILD!r} of its own at {foreign[0]!r}; adapters go there: rename it"
        )
    refuse_disabled(model)
    refuse_taken(tuners, adapter)
    refuse_merged(model, "adding an adapter")
