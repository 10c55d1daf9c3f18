"""The matrices A and B (and λ) at each adapted module, checked to belong together."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
from torch import Tensor

from tunerkit.errors import first, shown
from tunerkit.plugin import FileError
from tunerkit_peft.adapter_config import Settings
from tunerkit_peft.places import Place, Rename, place_of
from tunerkit_peft.weights import Weights


@attrs.frozen(eq=False)
class Parts:
    """The matrices at one module.

    Attributes:
        place: Where it is.
        name: The path in the file.
        names: The names of the tensors in the file by part, ``"A"``, ``"B"`` and for AdaLoRA ``"E"``.
        rank: The rank, which the three agree on.
        is_stack: Whether A is (E, r, in) and B is (E, out, r), of a stack of E matrices.
    """

    place: Place
    name: str
    names: Mapping[str, str]
    rank: int
    is_stack: bool = False


def parts_of(settings: Settings, weights: Weights, rename: Rename) -> list[Parts]:
    """Pair the matrices.

    Raises:
        FileError: One of a pair is missing, or two have different ranks.
    """
    needed = ("A", "B") if settings.common.kind == "LORA" else ("A", "B", "E")
    found, problems = [], []
    for name, own in weights.factors.items():
        if wrong := list(wrong_parts(own, needed, settings.common.file)) or list(_wrong_shapes(weights, own)):
            problems += wrong
            continue
        found.append(Parts(place_of(name, rename), name, own, rank=weights.shape(own["A"])[0]))
    if problems:
        raise FileError("\n- ".join([f"{weights.file} is damaged or incomplete:", *first(problems)]))
    return found


def refuse_ranks(settings: Settings, weights: Weights, problems: list[str]) -> None:
    """Raise `FileError` for ranks that the settings do not explain, if there are such."""
    if problems:
        raise FileError(
            "\n- ".join(
                [
                    f"{weights.file} and {settings.common.file.name} do not belong together: the settings do not "
                    "explain these ranks, so the scale is unknown. Use the settings that were saved with the tensors:",
                    *first(problems),
                ]
            )
        )


def wrong_parts(own: Mapping[str, str], needed: tuple[str, ...], file: Path) -> Iterator[str]:
    """Yield which of the needed parts are missing, and which belong to another type."""
    some = next(iter(own.values()))
    if lacking := [part for part in needed if part not in own]:
        yield f"{shown(some)} is there without its {' and '.join(f'lora_{part}' for part in lacking)}"
    if "E" in own and "E" not in needed:
        yield f"{shown(own['E'])} belongs to AdaLoRA, and 'peft_type' in {file.name} is LORA"


def _wrong_shapes(weights: Weights, own: Mapping[str, str]) -> Iterator[str]:
    a, b = weights.shape(own["A"]), weights.shape(own["B"])
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or any(size != 1 for size in b[2:]):
        yield f"{shown(own['A'])} is {list(a)} and {shown(own['B'])} is {list(b)}; expected [r, in] and [out, r]"
    elif "E" in own and (shape := weights.shape(own["E"])) != (a[0], 1):
        yield f"{shown(own['E'])} is {list(shape)}; expected {[a[0], 1]}"


def matrices(weights: Weights, parts: Parts) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r), or those of a stack, in fp32; B with PEFT's repeated sum multiplied in."""
    if parts.is_stack:
        return weights.tensor(parts.names["A"]).float(), weights.tensor(parts.names["B"]).float()
    a, b = weights.matrix(parts.names["A"]), weights.matrix(parts.names["B"])
    return a, b if parts.place.times == 1 else b * parts.place.times
