"""Compare an adapter with a model: what does not fit it, and what its settings name and the file does not hold."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
from torch import nn

from tunerkit.errors import first, shown
from tunerkit.plugin import BaseMismatchError, FileError, TargetError
from tunerkit_peft.other_tensors import TABLES, Others
from tunerkit_peft.paths import is_linear, tied_to_input
from tunerkit_peft.settings import Common
from tunerkit_peft.targets import ALL_LINEAR, HEADS, auto_class, ends, few, is_task_class
from tunerkit_peft.tensors import PREFIX, Adapted, Parts, Weights

_EXPERT: Final = re.compile(r"(?P<experts>(?:.+\.)?experts)\.\d+\..+")


def refuse_others(
    settings: Common,
    file: Path,
    paths: Sequence[str],
    others: Others,
    modules: Mapping[str, nn.Module],
    *,
    contradictions: Iterable[str] = (),
    mismatches: Iterable[str] = (),
) -> None:
    """Refuse what only this format can explain. Core compares all other paths and shapes.

    Args:
        settings: The settings.
        file: The file of the tensors.
        paths: The paths of the targets.
        others: The copies and the biases.
        modules: The model's modules.
        contradictions: What else does not fit, which no other base would change.
        mismatches: What else does not fit this base.

    Raises:
        FileError: Tensors contradict each other, or are of another type than their module.
        BaseMismatchError: The model has no such head, no modules for experts, or other sizes.
    """
    if wrong := [*_adapted_copies(paths, others), *contradictions]:
        raise FileError("\n- ".join([f"{file} does not fit this model:", *first(wrong)]))
    base = f", {shown(settings.base)}" if settings.base else ""
    if wrong := [*_mismatches(settings, paths, others, modules), *mismatches]:
        raise BaseMismatchError("\n- ".join([f"{file} was made for another base model{base}:", *first(wrong)]))


def _adapted_copies(paths: Sequence[str], others: Others) -> Iterator[str]:
    for path in paths:
        if copy := next((copy for copy in others.copies if path == copy or path.startswith(copy + ".")), ""):
            yield f"{path!r} is adapted, and {copy!r} is trained in full; PEFT never does both, so leave one out"


def other_kinds(parts: Sequence[Parts], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the matrices of a LoRA that belong to an embedding, or to a layer, and are at the other one."""
    for each in parts:
        name, module = each.names["A"], modules.get(each.place.path)
        if module is not None and isinstance(module, nn.Embedding) != ("lora_embedding_" in name):
            kind = "lora_embedding_A" if isinstance(module, nn.Embedding) else "lora_A"
            yield f"{name} belongs to a {type(module).__name__} here, for which PEFT writes {kind}"


def _mismatches(
    settings: Common, paths: Sequence[str], others: Others, modules: Mapping[str, nn.Module]
) -> Iterator[str]:
    heads = [path for path in (*others.copies, *paths) if path not in modules]
    heads = [path for path in heads if not set(HEADS).isdisjoint(path.split("."))]
    if heads:
        needed = auto_class(settings.selection.task, settings.selection.model_class)
        yield (
            f"it changes {few(heads)}, a head that this {type(modules.get('')).__name__} does not have; load the base "
            f"with it{f' by {needed}' if needed else ''}"
        )
    for path in paths:
        yield from _experts(path, modules)
    for path, own in others.copies.items():
        module, tensor = modules.get(path), own.get("weight")
        weight = getattr(module, "weight", None)
        is_table = isinstance(module, nn.Embedding) or path.rpartition(".")[2] in TABLES
        if tensor is None or weight is None or not is_table or tensor.ndim != 2 or len(tensor) == len(weight):
            continue
        yield (
            f"{path!r}, which is trained in full, has {len(tensor)} rows, and this model has {len(weight)}; before you "
            f"load it, call model.resize_token_embeddings({len(tensor)})"
        )


def _experts(path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Name experts that were modules in transformers 4."""
    found = _EXPERT.fullmatch(path)
    if found and path not in modules and f"{found['experts']}.0" not in modules:
        yield (
            f"{path!r} is an expert by itself, as in transformers 4; from transformers 5 on, all experts of "
            "a layer are one parameter, which tunerkit[experts] adapts: install it. Or merge the adapter with "
            "transformers 4 and PEFT (merge_and_unload), and use the merged model as the base"
        )


def other_kernels(weights: Weights, parts: Sequence[Parts], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the convolutions of a LoRA that have another kernel: two may have the same number of weights."""
    for each in parts:
        module, shape = modules.get(each.place.path), weights.shape(each.names["A"])
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and shape[1:] != tuple(module.weight.shape[1:]):
            yield (
                f"{each.names['A']} is {list(shape)}; the convolution at {each.place.path!r} needs [r, "
                f"{', '.join(map(str, module.weight.shape[1:]))}]"
            )


_ADAPTED: Final = {
    "LORA": (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention),
    "ADALORA": (nn.Linear, nn.Conv2d),
}
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@attrs.frozen(eq=False)
class _Context:
    """A file and a model, with what was found of the one in the other."""

    settings: Common
    modules: Mapping[str, nn.Module]
    targets: Sequence[str]
    others: Others
    takes: Callable[[nn.Module], bool]
    is_same_class: bool
    is_moved: bool

    def known(self, paths: Collection[str]) -> set[int]:
        """The identities of modules: a shared one has several paths, and the file may have another one of them."""
        return {id(self.modules[path]) for path in paths if path in self.modules}


@attrs.frozen
class _Missing:
    """Modules that one setting names and the file lacks.

    Attributes:
        lost: The file must have had them.
        unclear: They may be modules that the model of the training had not.
    """

    field: str
    lost: list[str]
    unclear: list[str]


def missing(
    settings: Common,
    file: Path,
    modules: Mapping[str, nn.Module],
    adapted: Adapted,
    others: Others,
    *,
    is_moved: bool,
) -> tuple[str, ...]:
    """Look for targets, trained copies and biases of this model that the settings name and the file lacks.

    The model may have modules that the one of the training had not, such as a head or a vision tower. So a module is
    only taken for lost if the model's class is that of the training, if another layer of the file has one like it, or
    if the file has nothing by its name.

    Args:
        settings: The settings.
        file: The file of the tensors.
        modules: The model's modules.
        adapted: What the file has at its targets. PEFT refuses what it does not adapt by name, so no folder lacks that.
        others: The copies and the biases.
        is_moved: Whether paths of the file are other ones in the model, so that expressions do not fit.

    Returns:
        A remark for each setting that names modules which may have been absent in training, and for tensors of modules
        that no setting names.

    Raises:
        FileError: Tensors are lost.
    """
    chosen = settings.selection
    is_same = is_task_class(modules.get(""), chosen.task, chosen.model_class)
    context = _Context(settings, modules, adapted.paths, others, adapted.takes, is_same, is_moved)
    if not {*context.targets, *others.copies, *others.biases} <= modules.keys():
        return ()  # of another base model, as core will say
    found = [_copies(context), _biases(context)]
    remarks = []
    try:
        found.append(_targets(context))
        beside = {*adapted.beside, *(tied_to_input(modules) if settings.tied else ())}
        if unnamed := [path for path in _unnamed(context) if path not in beside]:
            remarks.append(
                f"'target_modules' does not name {few(unnamed)}, for which the file has tensors: they are loaded here, "
                "and PEFT drops them"
            )
    except TargetError as error:
        remarks.append(f"'target_modules' cannot be compared with the tensors: {error}")
    if lines := [f"{each.field}: {few(each.lost)}" for each in found if each.lost]:
        raise FileError(_lost(settings, file, lines))
    remarks += [
        f"{each.field} also names {few(each.unclear)} of this model, for which the file has nothing; they stay as "
        "they are"
        for each in found
        if each.unclear
    ]
    return tuple(remarks)


def _lost(settings: Common, file: Path, lines: list[str]) -> str:
    instead = (
        ""
        if settings.bias == "none"
        else (
            ". Some versions of PEFT lose the biases of 'lora_only'; with 'bias' set to 'none' the base's own are used"
        )
    )
    return "\n- ".join(
        [
            f"{file} is incomplete: it has no tensors for modules that {settings.file.name} names. Save the "
            "adapter again where it was trained, or copy the file again. If the model of the training did not have "
            f"these modules, load that model, or name only its own in {settings.file.name}{instead}:",
            *first(lines),
        ]
    )


def _judged(
    field: str, lacking: Collection[str], present: Collection[str], kinds: Callable[[str], set[str]], context: _Context
) -> _Missing:
    if context.is_moved:
        return _Missing(field, [], list(lacking))
    like = {_NUMBER.sub("#", path) for path in present}
    known = {kind for path in present for kind in kinds(path)}
    lost = [
        path for path in lacking if context.is_same_class or _NUMBER.sub("#", path) in like or not kinds(path) <= known
    ]
    return _Missing(field, lost, sorted(set(lacking) - set(lost)))


def _targets(context: _Context) -> _Missing:
    chosen = context.settings.selection
    is_all = isinstance(chosen.targets, str) and chosen.targets.lower() == ALL_LINEAR
    matches = (lambda path: path.rpartition(".")[2] not in HEADS) if is_all else chosen.matcher()
    present = context.targets
    known = context.known(present)
    heads = _output_of(context.modules.get("")) if is_all or context.settings.tied else ()
    lacking = [
        path
        for path, module in context.modules.items()
        if (is_linear(module) if is_all else context.takes(module))
        and id(module) not in known
        and not any(module is each for each in heads)
        and not _is_inside(path, context)
        and not _is_copied(path, context)
        and matches(path)
    ]
    found = _judged("'target_modules'", lacking, present, chosen.kinds, context)
    return _Missing(found.field, [], [*found.lost, *found.unclear]) if is_all else found


def _unnamed(context: _Context) -> list[str]:
    """The targets that PEFT would not adapt. Which layer a path is in, its versions read in different ways."""
    chosen = context.settings.selection
    if context.is_moved or chosen.targets is None or str(chosen.targets).lower() == ALL_LINEAR:
        return []
    matches = attrs.evolve(chosen, layers=None).matcher()
    named = context.known([path for path in context.modules if matches(path)])
    return [path for path in context.targets if not named & context.known([path, *_around(path, context)])]


def _around(path: str, context: _Context) -> list[str]:
    """The attention by which PEFT names one of its parts."""
    return [path.rpartition(".")[0]] if _is_inside(path, context) else []


def _copies(context: _Context) -> _Missing:
    names = context.settings.copies
    known = context.known(context.others.copies)
    lacking = [
        path
        for path, module in context.modules.items()
        if path
        and names
        and (PREFIX + path).endswith(names)
        and id(module) not in known
        and not any(_is_under(path, other) or _is_under(other, path) for other in context.others.copies)
        and module.state_dict()
    ]
    outer = [path for path in lacking if not any(_is_under(path, other) for other in lacking if other != path)]
    if context.settings.tied:  # PEFT saves one side of a pair
        return _Missing("'modules_to_save'", [], outer)
    return _judged("'modules_to_save'", outer, list(context.others.copies), lambda path: {path}, context)


def _biases(context: _Context) -> _Missing:
    setting = context.settings.bias
    everywhere = setting == "all"
    known = context.known(context.others.biases)
    places = context.modules if everywhere else {} if setting == "none" else context.targets
    lacking = [
        path
        for path in places
        if (module := context.modules.get(path)) is not None
        and isinstance(getattr(module, "bias", None), nn.Parameter)
        and id(module) not in known
        and not _is_inside(path, context)
        and not (everywhere and _is_copied(path, context))
    ]
    return _judged(
        f"'bias' {setting!r}", lacking, list(context.others.biases), lambda path: {path.rpartition(".")[2]}, context
    )


def adapts(kind: str) -> Callable[[nn.Module], bool]:
    """Return a function that checks whether PEFT adapts a module by LoRA or AdaLoRA."""
    return lambda module: isinstance(module, _ADAPTED[kind]) or is_linear(module)


def _is_inside(path: str, context: _Context) -> bool:
    """Whether a module lies in torch's attention, of which PEFT renames the parts."""
    return isinstance(context.modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def _is_copied(path: str, context: _Context) -> bool:
    """Whether a module is trained in full, or in one that is: PEFT does not adapt those."""
    parts = path.split(".")
    names = {name for end in range(len(parts)) for name in ends(".".join(parts[: end + 1]))}
    return not names.isdisjoint(context.settings.copies) or any(
        _is_under(path, copied) for copied in context.others.copies
    )


def _is_under(path: str, other: str) -> bool:
    return path == other or path.startswith(other + ".")


def _output_of(model: nn.Module | None) -> Iterator[nn.Module]:
    """The tables of a model of transformers."""
    for name in ("get_output_embeddings", "get_input_embeddings"):
        try:
            found = getattr(model, name)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if isinstance(found, nn.Module):
            yield found
