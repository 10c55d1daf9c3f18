"""What the settings name and the file does not hold: a file that lost tensors computes something else, in silence."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs
from torch import nn

from tunerkit.errors import first
from tunerkit.plugin import FileError, TargetError
from tunerkit_peft.adapter_config import Common
from tunerkit_peft.others import Others
from tunerkit_peft.places import is_linear, tied_to_input
from tunerkit_peft.products import Adapted
from tunerkit_peft.selecting import few
from tunerkit_peft.selection import ALL_LINEAR, ends
from tunerkit_peft.tasks import HEADS, is_task_class
from tunerkit_peft.weights import PREFIX

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
