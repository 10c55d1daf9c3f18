"""The settings ``target_modules`` and ``modules_to_save`` with which PEFT takes exactly the modules that are meant."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from torch import nn

from tunerkit.errors import shown
from tunerkit.plugin import FileError
from tunerkit_peft.selection import ends
from tunerkit_peft.stacks import is_named

# What PEFT puts below an adapted module. It looks there too for modules to train in full.
BELOW: Final = (
    "base_layer",
    "lora_A",
    "lora_A.default",
    "lora_B",
    "lora_B.default",
    "lora_dropout",
    "lora_dropout.default",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


def target_modules(chosen: Collection[str], present: Iterable[str]) -> list[str] | str:
    """Return ``target_modules`` for some modules of a model.

    A name selects every module with that name, and a path also those whose path ends with it. So this is the shortest
    form that selects no other module: names, which servers understand best; or paths; or an expression.

    Args:
        chosen: The paths of the modules.
        present: The paths of all modules of the model.

    Returns:
        A list of names or paths, or a regular expression for whole paths.
    """
    wanted, there = set(chosen), list(present)
    for names in ({path.rpartition(".")[2] for path in wanted}, wanted):
        if {path for path in there if any(end in names for end in ends(path))} == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(wanted))


def target_parameters(chosen: Collection[str], model: nn.Module) -> list[str]:
    """Return ``target_parameters`` for some parameters of a model: the ends of their paths, or these as they are.

    Args:
        chosen: The paths of the parameters.
        model: The model.
    """
    short = {".".join(path.split(".")[-3:]) for path in chosen}
    others = (path for path, _ in model.named_parameters() if path not in chosen)
    return sorted(chosen if any(is_named(path, short) for path in others) else short)


def pattern_for(path: str, others: Collection[str]) -> str:
    """Return a key of ``rank_pattern`` that matches one of several modules, and no other.

    Args:
        path: The module's path.
        others: The paths of all adapted modules.

    Returns:
        The path, escaped; anchored if it is the end of another one.
    """
    ambiguous = any(other.endswith("." + path) for other in others)
    return ("^" if ambiguous else "") + re.escape(path)


def modules_to_save(
    copies: Collection[str], targets: Collection[str], present: Iterable[str], below: Iterable[str] = BELOW
) -> list[str]:
    """Return ``modules_to_save`` for the modules that are trained in full: their paths.

    PEFT takes each module whose path ends with a name, also in the middle of a word, and takes no target below a path
    that has the name in it. So this fails if the paths select anything but these modules.

    Args:
        copies: The paths of the modules.
        targets: The paths of the targets.
        present: The paths of all modules of the model.
        below: What PEFT puts below a target.

    Raises:
        FileError: PEFT would also train other modules, or leave targets out.
    """
    inside = tuple(below)
    lower = [f"{target}.{name}" for target in targets for name in inside]
    names = tuple(sorted(copies))
    others = sorted({path for path in (*present, *lower) if path.endswith(names)} - set(names))
    others += [path for path in targets if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in names)]
    if others:
        raise FileError(
            f"PEFT selects the modules that it trains in full by the ends of their names: with {few(names)} it would "
            f"also take {few(others)}. Train these in full too (train_modules), or call tunerkit.unwrap(model, "
            "keep_merged=True) and save the whole model instead"
        )
    return list(names)


def few(paths: Sequence[str]) -> str:
    """Return the first paths, for a message."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(shown, paths[:3])) + more
