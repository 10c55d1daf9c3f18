"""Read a PEFT adapter: settings and tensors together, as tunerkit's own record."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import attrs
import torch
from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import Factors, FileError, Foreign
from tunerkit_peft import files
from tunerkit_peft.adapter_config import Common, Settings, read_settings, settings_at
from tunerkit_peft.completeness import adapts, missing
from tunerkit_peft.fitting import other_kernels, other_kinds, refuse_others
from tunerkit_peft.from_adalora import read_adalora
from tunerkit_peft.from_lora import read_lora
from tunerkit_peft.from_stacks import experts_around, split_stacks
from tunerkit_peft.from_table import kind_of, named_adapter
from tunerkit_peft.kinds import declared_for
from tunerkit_peft.moving import Moved, moving
from tunerkit_peft.others import Others, read_others
from tunerkit_peft.parts import parts_of
from tunerkit_peft.places import NO_MERGE, modules_of, place_of, refuse_convolutions, tied_to_input
from tunerkit_peft.products import Adapted, Read
from tunerkit_peft.selecting import few
from tunerkit_peft.table_settings import TableSettings, read_table_settings
from tunerkit_peft.token_rows import read_rows, split_rows
from tunerkit_peft.weights import LORA, Weights, open_weights


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
    found = files.find(path)
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
