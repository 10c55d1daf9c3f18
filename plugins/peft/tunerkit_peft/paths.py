"""Where the modules that a PEFT file names are in the user's model, also if a wrapper was added or taken away."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, Final

import attrs
from torch import nn

from tunerkit.errors import first, shown
from tunerkit.plugin import FileError
from tunerkit_peft.targets import few

# PEFT wraps attention's output projection inside the wrapped attention.
INNER: Final = ".base_layer.out_proj"
_CHILD: Final = "tunerkit"  # where tunerkit keeps adapters, below the modules of the model
Rename = Callable[[str], str]
# What to do with an adapter of convolutions that PEFT cannot merge either.
NO_MERGE: Final = (
    "So PEFT cannot merge it into them either. Use this adapter in PEFT; or train one with tunerkit, whose adapters "
    "change the weight there too; or leave these layers out of target_modules, and train again"
)


@attrs.frozen
class Place:
    """One adapted module.

    Attributes:
        path: Its path in the user's model.
        owner: The path by which PEFT's patterns name it: for attention's output projection, that of the attention.
        times: How often PEFT adds the product. It applies the one of attention's output projection twice: it adds it to
            the weight, and merges the same layer again.
    """

    path: str
    owner: str
    times: int


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's own modules by path, tied ones by each of their paths, and adapters left out."""
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if _CHILD not in path.split(".")}


def is_linear(module: nn.Module) -> bool:
    """Whether PEFT takes a module for a linear layer."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def tied_to_input(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the input's embedding, and then what is tied to it, by path, if PEFT adapts these together; else {}."""
    model: Any = modules.get("")
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return {}
    found = None
    with suppress(AttributeError, NotImplementedError):
        found = model.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        return {}
    sides = {
        id(each): path for path, each in reversed([*modules.items()]) if getattr(each, "weight", None) is found.weight
    }
    paths = sorted(sides.values(), key=lambda path: modules[path] is not found)
    return {path: modules[path] for path in paths} if len(paths) > 1 else {}


def place_of(name: str, rename: Rename) -> Place:
    """Return the place of a module that a file calls ``name``."""
    if not name.endswith(INNER):
        return Place(rename(name), name, times=1)
    owner = name.removesuffix(INNER)
    return Place(f"{rename(owner)}.out_proj", owner, times=2)


def refuse_convolutions(
    source: object, modules: Mapping[str, nn.Module], paths: Iterable[str], kind: str, instead: str
) -> None:
    """Refuse convolutions in which PEFT computes something that is no change of the weight.

    Args:
        source: What an error is about.
        modules: The model's modules.
        paths: The paths of the targets.
        kind: PEFT's type of adapter, see `obstacle`.
        instead: What to do, as a sentence without its end.

    Raises:
        FileError: There are such convolutions.
    """
    wrong = [f"{path} ({reason})" for path in paths if (reason := obstacle(modules.get(path), kind))]
    if wrong:
        raise FileError(
            "\n- ".join(
                [
                    f"{source}: PEFT changes the output of these convolutions in a way that no change of their weight "
                    f"does. {instead}:",
                    *first(wrong),
                ]
            )
        )


def obstacle(module: nn.Module | None, kind: str) -> str:
    """Return why PEFT does not change the weight of a convolution as tunerkit does; empty if it does.

    Its LoRA runs A as a convolution of its own, and its AdaLoRA multiplies the matrices into the weight of one group.
    Other types add to the weight. None of them has other padding than zeros.
    """
    return next(_obstacles(module, kind), "") if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else ""


def caveats(modules: Iterable[tuple[str, nn.Module | None]], kind: str) -> Iterator[str]:
    """Yield where PEFT computes the same as tunerkit only once it has merged the adapter."""
    patches = [path for path, each in modules if isinstance(each, nn.Conv2d) and math.prod(each.kernel_size) > 1]
    if kind == "OFT" and patches:
        yield (
            f"PEFT's OFT adds up the patches of a convolution's input that overlap, and its merge does not: at "
            f"{few(patches)}, PEFT computes what is computed here once it has merged the adapter, or where the kernel "
            "covers the whole input"
        )


def _obstacles(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, kind: str) -> Iterator[str]:
    if kind in ("LORA", "ADALORA", "OFT") and module.groups > 1:
        yield f"groups {module.groups}"
    pairs = zip(module.kernel_size, module.dilation, strict=True)
    if kind == "LORA" and any(size > 1 and dilation > 1 for size, dilation in pairs):
        yield f"dilation {shown(module.dilation)}"
    padded = module.padding not in ("valid",) and any(each != 0 for each in module.padding)
    if module.padding_mode != "zeros" and padded:
        yield f"padding mode {module.padding_mode!r}"


# Wrappers that a model gains or loses between versions of transformers, or between a head model and its body.
_WRAPPERS: Final = ("", "model.", "base_model.", "language_model.", "model.language_model.", "language_model.model.")
# `torch.compile` and data parallelism put these into the names.
_PROCESSES: Final = re.compile(r"^(?:(?:_orig_mod|module)\.)+|(?<=\.)_orig_mod\.")
_BLOCKS: Final = re.compile(r"\.\d+\..*")
Change = tuple[str, str]


@attrs.frozen
class Moved:
    """The paths of a file in a model.

    Attributes:
        rename: Gives the path in the model for one in the file; the same one if nothing is known of it.
        remarks: One for each change.
    """

    rename: Rename
    remarks: tuple[str, ...]


def moving(names: Iterable[str], modules: Mapping[str, nn.Module], prefix: str) -> Moved:
    """Find the changes of all paths of a file together, or else of each of its groups of layers.

    Parts of a model may have moved each in its own way, such as text and vision. A change counts only if all paths of a
    group are in the model with it, if none is without it, and if no other change does that. Two paths never become one.
    Paths that nothing fits stay as they are, and are reported so.

    Args:
        names: The paths of all adapted modules, as the file has them.
        modules: The model's modules.
        prefix: The name that a head model of transformers gives its body; may be empty.
    """
    owners = [place_of(name, str).owner for name in names]
    if all(owner in modules for owner in owners):
        return Moved(str, ())
    wrappers = tuple(dict.fromkeys((*_WRAPPERS, f"{prefix}."))) if prefix else _WRAPPERS
    plain = {owner: _PROCESSES.sub("", owner) for owner in owners}
    changed = _changed(list(plain.values()), modules, wrappers)
    stripped = [bare for owner, bare in plain.items() if owner != bare and (bare in changed or bare in modules)]
    if not changed and not stripped:
        return Moved(str, ())

    def rename(path: str) -> str:
        bare = path if path in modules else _PROCESSES.sub("", path)
        if bare in modules:
            return bare
        if bare in changed:
            return changed[bare][0]
        # Nothing else is known of a module that is no target, such as a head.
        options = [new for (new,), _ in _fitting([bare], modules, wrappers).items()]
        return options[0] if len(options) == 1 else path

    told = ["the 'module.' or '_orig_mod.' that data parallelism or torch.compile adds is left out of its paths"]
    return Moved(rename, (*(told if stripped else ()), *_remarks(changed)))


def _changed(
    owners: Sequence[str], modules: Mapping[str, nn.Module], wrappers: Sequence[str]
) -> dict[str, tuple[str, Change]]:
    """The new path of each that changes, and the change."""
    groups: dict[str, list[str]] = {}
    for owner in owners:
        groups.setdefault(_BLOCKS.sub("", owner), []).append(owner)
    for choice in ([list(owners)], list(groups.values())):
        found: dict[str, tuple[str, Change]] = {}
        for group in choice:
            fitting = _fitting(group, modules, wrappers)
            if len(fitting) == 1 and not any(owner in modules for owner in group):
                ((new, change),) = fitting.items()
                found |= {owner: (path, change) for owner, path in zip(group, new, strict=True)}
        ends = {found[owner][0] if owner in found else owner for owner in owners}
        if found and len(ends) == len(set(owners)):
            return found
    return {}


def _fitting(
    owners: Sequence[str], modules: Mapping[str, nn.Module], wrappers: Sequence[str]
) -> dict[tuple[str, ...], Change]:
    """The changes with which all paths are in the model, by the new paths."""
    return {
        tuple(added + owner.removeprefix(gone) for owner in owners): (gone, added)
        for gone, added in product(wrappers, repeat=2)
        if all(owner.startswith(gone) and added + owner.removeprefix(gone) in modules for owner in owners)
    }


def _remarks(changed: Mapping[str, tuple[str, Change]]) -> list[str]:
    changes = dict.fromkeys(change for _, change in changed.values())
    return [
        f"its modules are found under {added or 'the model itself'!r} instead of {gone or 'the model itself'!r}"
        for gone, added in changes
    ]
