"""Read a PEFT adapter: settings and tensors together, as tunerkit's own record; or describe it without a model."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import attrs
import torch
from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import Description, Factors, FileError, Foreign
from tunerkit_peft.checks import adapts, missing, other_kernels, other_kinds, refuse_others
from tunerkit_peft.declarations import Declaration, declared_for
from tunerkit_peft.declared_reading import kind_of, named_adapter
from tunerkit_peft.declared_settings import TableSettings, read_table_settings
from tunerkit_peft.folders import find_files
from tunerkit_peft.lora_reading import read_adalora, read_lora
from tunerkit_peft.other_tensors import Others, copy_around, read_others, read_rows, split_rows
from tunerkit_peft.packed_experts import experts_around, split_stacks
from tunerkit_peft.paths import NO_MERGE, Moved, modules_of, moving, place_of, refuse_convolutions, tied_to_input
from tunerkit_peft.settings import Common, Settings, read_settings, settings_at
from tunerkit_peft.targets import auto_class, few
from tunerkit_peft.tensors import LORA, Adapted, Read, Weights, open_weights, parts_of


def read(path: Path, model: nn.Module) -> Foreign:
    """Read an adapter that PEFT saved: a LoRA, an AdaLoRA, or one of a type whose names a method declares.

    Args:
        path: The folder, one of its two files, or a name on the hub.
        model: The base model. Only names, types and shapes are used, and the values of embeddings if they are there.

    Returns:
        The adapter, as LoRA, AdaLoRA or that method, with the scale and the settings of its training.

    Raises:
        FileError: The files are damaged, or hold what tunerkit cannot.
        BaseMismatchError: They were made for another base model.
        PluginError: The method declares PEFT's names wrongly.
    """
    found = find_files(path)
    held = settings_at(found.config)
    declared = declared_for(held, found.config)
    modules = modules_of(model)
    settings: Settings | TableSettings
    if declared is None:
        settings, kind = read_settings(found.config, held), LORA
    else:
        settings, kind = read_table_settings(found.config, held, declared), kind_of(declared.names)
    common, weights = _with_tied(settings.common, modules), open_weights(found.weights, kind)
    moved = moving(experts_around(weights.factors, modules), modules, getattr(model, "base_model_prefix", ""))
    if isinstance(settings, Settings):
        keys, weights = split_rows(settings, weights)
        rows = read_rows(settings, weights, keys, modules, moved.rename)
        adapted, method = _products(settings, weights, modules, moved, rows), common.kind.lower()
    else:
        adapted, method = named_adapter(settings, weights, modules, moved), settings.declared.method
    others = read_others(common, weights, modules, moved.rename)
    refuse_others(
        common,
        weights.file,
        adapted.paths,
        others,
        modules,
        contradictions=adapted.contradictions,
        mismatches=adapted.mismatches,
    )
    tying = [*_tying(common, adapted.paths, others, modules)]
    own = adapted.read()
    unknown = missing(common, weights.file, modules, adapted, others, is_moved=bool(moved.remarks))
    return Foreign(
        own.factors,
        method,
        config=own.config,
        tensors=own.tensors,
        shared=own.shared,
        copies=others.copies,
        biases=others.biases,
        base=common.base,
        remarks=(
            *(*adapted.remarks, *moved.remarks, *unknown, *tying),
            *(*_other_base(common, model), *_padding(own, modules)),
        ),
    )


def _products(
    settings: Settings,
    weights: Weights,
    modules: Mapping[str, nn.Module],
    moved: Moved,
    rows: Mapping[str, Factors],
) -> Adapted:
    """The matrices of a LoRA or an AdaLoRA. Convolutions come first: some have matrices of other sizes in PEFT."""
    kind = settings.common.kind
    weights, stacked = split_stacks(settings, weights, modules, moved.rename) if kind == "LORA" else (weights, [])
    paths = [place_of(name, moved.rename).path for name in weights.factors]
    refuse_convolutions(weights.file, modules, paths, kind, NO_MERGE)
    parts = [*parts_of(settings, weights, moved.rename), *stacked]
    stacks = [each.place.path for each in stacked]
    if both := [path for path in rows if path in paths]:
        raise FileError(f"{weights.file} adapts {both[0]!r} and trains rows of it; PEFT never does both")
    return Adapted(
        paths=[*paths, *stacks, *rows],
        takes=adapts(kind),
        contradictions=list(other_kinds(parts, modules)),
        mismatches=list(other_kernels(weights, parts, modules)) if kind == "LORA" else [],
        read=lambda: (
            read_lora(settings, weights, parts, modules, rows)
            if kind == "LORA"
            else read_adalora(settings, weights, parts)
        ),
        remarks=settings.remarks,
        beside=[*stacks, *rows],
    )


def _with_tied(settings: Common, modules: Mapping[str, nn.Module]) -> Common:
    """Name what PEFT trains in full with one side of a tied weight: its file holds them all."""
    sides = [*tied_to_input(modules)] if settings.tied and settings.copies else []
    is_named = any(path.endswith(settings.copies) for path in sides)
    return attrs.evolve(settings, copies=(*settings.copies, *sides)) if is_named else settings


def _tying(settings: Common, paths: Sequence[str], others: Others, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Say that both sides of a tied weight train apart, or refuse adapters of both, if the file holds one side."""
    changed = {*paths, *others.copies}
    embeddings = [path for path in changed if isinstance(modules.get(path), nn.Embedding)]
    if not settings.tied or not embeddings:
        return
    sides = [*tied_to_input(modules)]
    if not sides or not changed.issuperset(sides):
        raise FileError(
            f"{settings.file}: 'ensure_weight_tying' is true, so PEFT changes what is tied to {embeddings[0]!r} with "
            "it, and the file and this model do not have both sides. Load the base it was made for; or merge the "
            "adapter in PEFT (merge_and_unload), and use the merged model as the base"
        )
    yield f"PEFT trains {few(sides)} as one ('ensure_weight_tying'); further training here changes each on its own"


def _other_base(settings: Common, model: nn.Module) -> Iterator[str]:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not (isinstance(name, str) and name and settings.base):
        return
    # A folder is often a copy of the repository, so only the last part says something.
    if PurePosixPath(name).name != PurePosixPath(settings.base).name:
        yield (
            f"it was made for the base model {shown(settings.base)}, and this one is {shown(name)}; names and shapes "
            "fit, but if the weights differ, so does the result"
        )


def _padding(own: Read, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for path in own.factors:
        module = modules.get(path)
        index = module.padding_idx if isinstance(module, nn.Embedding) else None
        if index is None:
            continue
        q, p = own.factors[path]
        if q.shape[1] > index and torch.count_nonzero(p @ q[:, index]):
            yield f"it changes the row of the padding token of {path!r}, which tunerkit leaves as it is"


# Heads with one row for each class, whatever the module is called. Without a task, the model's class decides.
_MAYBE_CLASSES: Final = ("SEQ_CLS", "TOKEN_CLS", "")


def describe(path: Path) -> Description:
    """Describe the adapter at a path from its settings, and from the names and shapes of its tensors.

    Raises:
        FileError: The files are damaged, or hold what tunerkit cannot.
    """
    found = find_files(path)
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
