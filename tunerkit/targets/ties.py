"""Ties, parameters that several modules hold: which of these an adapter leaves out, and how to adapt them all."""

from collections.abc import Collection, Sequence

from torch import nn

from tunerkit.paths import is_under, parent
from tunerkit.targets.scan import Scan


def left_out(names: Sequence[str], sides: Collection[str]) -> list[str]:
    """Find the modules that hold a parameter too and would not change with the others.

    If a module around a layer holds the layer's bias under another name, as BERT's masked head does, that name is only
    an alias: the layer adds the bias.

    Args:
        names: The full names of a tied parameter.
        sides: The paths of the modules that are adapted or trained in full, each on its own.

    Returns:
        The names at none of the ``sides``; none if the parameter belongs to no side at all.
    """
    inside = [name for name in names if is_under(name, sides)]
    return [name for name in names if inside and name not in inside and not _is_alias(name, inside)]


def _is_alias(name: str, of: Collection[str]) -> bool:
    owner = parent(name)
    around = (not owner or is_under(other, (owner,)) for other in of)
    return "bias" in name.rpartition(".")[2] and any(around)


def way_out(scanned: Scan, name: str, names: Sequence[str], *, setting: str) -> str:
    """The end of an error about a tied parameter: what makes it adaptable.

    Args:
        scanned: The scan of the model.
        name: The parameter's name at the module that was asked for.
        names: All of its names.
        setting: The setting in which the modules may be named: ``"targets"`` or ``"train_modules"``.

    Returns:
        Sentences; the last ends with Python code that unties the model.
    """
    owners = list(dict.fromkeys(map(parent, names)))
    found = [scanned.by_path.get(owner) for owner in owners]
    nameable = all(each is not None and (setting != "targets" or each.base is not None) for each in found)
    listed = ", ".join(f'"{owner}"' for owner in owners)
    each_own = (
        f"Name all of them by plain names, and each gets its own: {setting}=({listed}). "
        if nameable and all(owners)
        else ""
    )
    owner, leaf = parent(name), name.rpartition(".")[2]
    dotted = all(part.isidentifier() for part in owner.split("."))
    place = f"model.{owner}" if dotted else f'model.get_submodule("{owner}")'
    code = f"{place}.{leaf} = torch.nn.Parameter({place}.{leaf}.detach().clone())"
    match scanned.root.module:
        case nn.Module(config=object(tie_word_embeddings=True)):
            code += "; model.config.tie_word_embeddings = False"
    untying = "Or untie" if each_own else "Untie"
    return f"{each_own}{untying} the model before you wrap it or load onto it: {code}"
