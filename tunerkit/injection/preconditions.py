"""Rejects models, adapter names and settings with which no adapter can be put in, and warns about doubtful ones."""

import re
import warnings
from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.parameter import UninitializedParameter

from tunerkit.errors import AdapterError, ConfigError, TunerkitWarning, closest
from tunerkit.injection.merged_state import refuse_fixed
from tunerkit.injection.root import inside
from tunerkit.injection.slots import Slot, base_modules, slots_of, walk
from tunerkit.injection.tuner import Tuner, tuners_of
from tunerkit.libraries import is_partitioned, refuse_engine, torch_private
from tunerkit.paths import CHILD, is_under
from tunerkit.patterns import matcher
from tunerkit.targets import Scan

_NAME = r"[^./\ud800-\udfff]{1,64}"


def check_name(adapter: object, taken: Collection[str]) -> None:
    """Raise `AdapterError` for a name that cannot be a part of parameter names, or that another adapter has."""
    if not isinstance(adapter, str) or not re.fullmatch(_NAME, adapter):
        raise AdapterError(
            f"adapter name {adapter!r}: expected 1 to 64 characters without '.', '/' or half of a surrogate pair, "
            "which no file can store in the names of parameters; choose another"
        )
    if adapter in taken:
        raise AdapterError(f"the model has an adapter named {adapter!r} already; choose another, or delete that one")


def ready_model(model: object, adapter: str, *, trainable: bool) -> nn.Module:
    """Return the model inside `torch.compile` and the like. Raise `AdapterError` if it cannot take another adapter."""
    root = inside(model)
    lazy = [name for name, p in root.named_parameters() if issubclass(type(p), UninitializedParameter)]
    if lazy:
        raise AdapterError(f"the model has parameters without a shape yet ({lazy[0]}, ...); run one batch first")
    if trainable and (name := next((name for name, p in root.named_parameters() if p.is_inference()), None)):
        raise AdapterError(
            f"the model was built inside torch.inference_mode(), and torch trains nothing beside such weights ({name}, "
            "...); build or load it outside"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in root.modules()):
        raise AdapterError("the model is already inside DistributedDataParallel; wrap it first, then put it into DDP")
    refuse_engine(base_modules(root), "wrap")
    tuners = tuners_of(root)
    wrapped = next((tuner.model for tuner in tuners.values()), None)
    if wrapped is not root and (tuners or next(walk(root), None) is not None):
        whole = f"the {type(wrapped).__name__} inside it" if wrapped is not None else "the model that it is a part of"
        raise AdapterError(f"{whole} has adapters already; wrap that one, so that one model holds them all")
    foreign = [path for path, module in base_modules(root) if hasattr(module, CHILD) and slots_of(module) is None]
    if foreign:
        raise AdapterError(
            f"the model has an attribute {CHILD!r} of its own at {foreign[0]!r}; adapters go there: rename it"
        )
    check_name(adapter, tuners)
    refuse_fixed(root, "adding an adapter")
    return root


def refuse_idle_patterns(tuner: Tuner) -> None:
    """Raise `ConfigError` for a per-target setting that matches no target: most often the name is mistyped."""
    paths = [target.path for target in tuner.targets]
    names = {path.rpartition(".")[2] for path in paths}
    problems = [
        f"{pattern!r} matches none of the {len(paths)} targets{closest(pattern, names)} @ $.{field}"
        for pattern, field in tuner.config.target_patterns()
        if not any(map(matcher(pattern), paths))
    ]
    if problems:
        raise ConfigError(problems)


def refuse_overlap(model: nn.Module, paths: Collection[str], copies: Collection[str]) -> None:
    """Reject a module trained in full that is, contains or is inside a module of another adapter.

    Several adapters may each train a copy of one module, if none of the others is active.
    """
    for path, _, slots in walk(model):
        owners = ", ".join(repr(name) for name in slots.names)
        shared = path in copies and len(slots.copies) == len(slots.names)
        nested = [wanted for wanted in paths if _nested(path, wanted) and not shared]
        if copied := [wanted for wanted in nested if wanted in copies]:
            raise AdapterError(f"cannot train {copied[0]!r} in full: adapter {owners} is at {path!r}; delete it first")
        if nested and slots.copies:
            raise AdapterError(f"cannot adapt {nested[0]!r}: adapter {owners} trains {path!r} in full")
        if shared and slots.active:
            raise AdapterError(
                f"cannot train {path!r} in full: adapter {slots.active[0]!r} does and is active, and one replaces the "
                "other; call tunerkit.activate(model, []) first, then activate the one that is wanted"
            )


def _nested(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


def refuse_mixed_dtypes(tuner: Tuner, built: Mapping[str, Slot]) -> None:
    """Raise `AdapterError` if DeepSpeed could not train an adapter beside a base that its zero.Init has partitioned.

    It wants one dtype for all that is trained. Elsewhere it casts what is trained, but not beside such a base.

    Args:
        tuner: The adapter's handle.
        built: Its slots by path.
    """
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for slot in built.values() for p in slot.parameters()})
    if len(dtypes) > 1 and any(map(is_partitioned, tuner.model.parameters())):
        raise AdapterError(
            f"what would be trained has the dtypes {' and '.join(dtypes)}, and DeepSpeed trains one dtype beside a "
            "base in zero.Init. Copies and biases have the base's: set adapter_dtype to it, or train none in full"
        )


def warn_of_limits(scanned: Scan, tuner: Tuner) -> None:
    """Warn about norms of the frozen base that training still changes, and about targets without dropout."""
    copies = {copied.path for copied in tuner.copies}
    moving = [
        found.path
        for found in (scanned.root, *scanned.modules)
        if torch_private.has_statistics(found.module)
        and found.module.track_running_stats
        and found.module.running_mean is not None
        and not is_under(found.path, copies)
    ]
    if moving:
        warnings.warn(
            f"{len(moving)} normalisation layers of the frozen base ({moving[0]}, ...) update their running statistics "
            "in training mode, and the adapter's file does not contain them. Put these layers in eval mode while "
            "training, or name them in train_modules",
            TunerkitWarning,
            stacklevel=3,
        )
    bypassed = [target.path for target in tuner.targets if scanned.by_path[target.path].reader is not None]
    if bypassed and tuner.config.dropout:
        warnings.warn(
            f"dropout is not applied at {len(bypassed)} targets ({bypassed[0]}, ...): their owner uses the weight "
            "directly, bypassing the layer's forward(), so the adapter changes the weight and gets no input. Set "
            "dropout to 0, or exclude them if that matters",
            TunerkitWarning,
            stacklevel=3,
        )
