"""How the paths of a file become those of a model, where a wrapper was added or taken away."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Final

import attrs
from torch import nn

from tunerkit_peft.places import Rename, place_of

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
