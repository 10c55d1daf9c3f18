"""Say what a PEFT folder holds, without a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tunerkit.plugin import Description
from tunerkit_peft import files
from tunerkit_peft.adapter_config import Common, Settings, read_settings, settings_at
from tunerkit_peft.declaration import Declaration
from tunerkit_peft.from_table import kind_of
from tunerkit_peft.kinds import declared_for
from tunerkit_peft.others import copy_around
from tunerkit_peft.table_settings import read_table_settings
from tunerkit_peft.tasks import auto_class
from tunerkit_peft.weights import Weights, open_weights

# Heads with one row for each class, whatever the module is called. Without a task, the model's class decides.
_MAYBE_CLASSES: Final = ("SEQ_CLS", "TOKEN_CLS", "")


def describe(path: Path) -> Description:
    """Describe the adapter at a path from its settings, and from the names and shapes of its tensors.

    Raises:
        FileError: The files are damaged, or hold what tunerkit cannot.
    """
    found = files.find(path)
    held = settings_at(found.config)
    declared = declared_for(held, found.config)
    if declared is None:
        settings, weights = read_settings(found.config, held), open_weights(found.weights)
        common, method, told = settings.common, settings.common.kind.lower(), _told(settings)
        ranks = {path: _one_rank(settings, _rank(weights, path)) for path in weights.factors}
    else:
        named = read_table_settings(found.config, held, declared)
        weights = open_weights(found.weights, kind_of(declared.names))
        common, method, told = named.common, declared.method, {**named.config, **named.chosen}
        told |= _measured(declared.names, weights)
        told |= {f"{own}_pattern": dict(table) for own, table in named.patterns.items() if table}
        ranks = {path: rank if isinstance(rank := named.config.get("rank"), int) else 0 for path in weights.factors}
    chosen = common.selection
    return Description(
        method=method,
        base=common.base,
        model_class=auto_class(chosen.task, chosen.model_class),
        labels=_labels(weights) if chosen.task in _MAYBE_CLASSES else 0,
        ranks=ranks,
        copies=_copies(common, weights),
        settings={**told, "bias": common.bias, "modules_to_save": list(common.copies), **_revision(held)},
    )


def _revision(held: Mapping[str, object]) -> dict[str, object]:
    """The commit, branch or tag of the base on the hub, if the files say one."""
    found = held.get("revision")
    return {"revision": found} if isinstance(found, str) and found else {}


def _measured(names: Declaration, weights: Weights) -> dict[str, object]:
    """The settings that the tensors say, by those of one target."""
    said = {own for own, setting in names.settings.items() if setting.measured}
    found: dict[str, object] = {}
    for part, key in next(iter(weights.factors.values())).items():
        shape = names.tensors[part].shape if part in names.tensors else None
        found |= {str(own): size for own, size in zip(shape or (), weights.shape(key), strict=False) if own in said}
    return found


def _labels(weights: Weights) -> int:
    """The fewest rows of a matrix that is trained in full: a head's last layer. 0 if there is none."""
    shapes = [weights.shape(key) for name, key in weights.others.items() if name.endswith("weight")]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=0)


def _rank(weights: Weights, path: str) -> int:
    """The rows of A; 0 if it is missing, which `read` refuses."""
    name = weights.factors[path].get("A")
    return weights.shape(name)[0] if name else 0


def _one_rank(settings: Settings, rows: int) -> int:
    """The rank of one expert, where A has the rows of all of them: how many there are, only the base says."""
    packed = settings.parameters and rows not in {settings.rank, *settings.ranks.values()}
    return settings.rank if packed and rows % settings.rank == 0 else rows


def _copies(settings: Common, weights: Weights) -> tuple[str, ...]:
    """The outermost modules that ``modules_to_save`` names, of those that have tensors. PEFT compares ends of names."""
    found = dict.fromkeys(copy_around(settings, name) for name in weights.others)
    return tuple(path for path in found if path)


def _told(settings: Settings) -> dict[str, object]:
    told: dict[str, object] = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "rslora": settings.rslora,
        "rank_pattern": dict(settings.ranks),
        "alpha_pattern": dict(settings.alphas),
    }
    told |= {"start": settings.start} if settings.start else {}
    told |= {"trainable_token_indices": dict(settings.tokens)} if settings.tokens else {}
    told |= {"target_parameters": list(settings.parameters)} if settings.parameters else {}
    if settings.common.kind == "ADALORA":
        told |= {"target_rank": settings.schedule.target_r, "total_steps": settings.schedule.total_step}
    return told
