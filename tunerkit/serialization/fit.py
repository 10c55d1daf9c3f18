"""Fill slots with a file's tensors, after all of them were compared with what the slots need."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tunerkit.errors import BaseMismatchError, FileError, cut, first
from tunerkit.injection import Slot
from tunerkit.libraries import labels_hint
from tunerkit.paths import few, join
from tunerkit.serialization.finite import nonfinite

# One of these may replace another: a base or an adapter may be held in another precision than it was saved in.
_PRECISIONS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_COPY, _BIAS = "copy.", "bias"


class _Resized(NamedTuple):
    """A tensor of a copy or of a trained bias, its shape in the file, and the shape that this base needs."""

    path: str
    name: str
    saved: tuple[int, ...]
    found: tuple[int, ...]


def fill(
    slots: Iterable[tuple[str, Slot]],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    source: str,
    *,
    misfit: str = "does not fit its own header",
) -> dict[str, Slot]:
    """Copy the file's tensors into ``slots``, each as soon as it comes; slots that do not fit are not kept.

    Args:
        slots: Pairs of a module's path and its slot.
        tensors: The file's tensors.
        model: The base model, for a hint in an error.
        source: The file.
        misfit: What an error says of a file whose tensors are not those of the slots.

    Returns:
        The slots by path.

    Raises:
        FileError: Tensors are missing, unexpected, misshapen, of another kind, or not finite once they are in the
            slots' precision; the error lists the first ones, and counts all.
        BaseMismatchError: Only modules that are trained in full have another size in this base.
    """
    filled: dict[str, Slot] = {}
    problems: list[str] = []
    resized: list[_Resized] = []
    used: set[str] = set()
    cast: dict[str, Slot] = {}
    for path, slot in slots:
        state = {name: (join(path, name), built) for name, built in slot.state_dict().items()}
        used.update(full for full, _ in state.values())
        misfits = list(_misfits(state.values(), tensors))
        if not misfits:
            own = {name: tensors[full] for name, (full, _) in state.items()}
            resized += (others := list(_resized_base(path, state, own)))
            misfits = [] if others else _load_slot(path, slot, own)
            if any(built.dtype != tensors[full].dtype for full, built in state.values()):
                cast[path] = slot
        problems += misfits
        if not (problems or resized):
            filled[path] = slot
    problems += [f"unexpected: {name}" for name in tensors if name not in used]
    _refuse(problems, resized, model, source, misfit)
    _refuse_overflow(cast, tensors, source)
    return filled


def _misfits(state: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, built in state:
        if name not in tensors:
            yield f"missing: {name}"
        elif (found := tensors[name].dtype) != built.dtype and not {found, built.dtype} <= _PRECISIONS:
            yield f"{cut(name, 200)} is {_name(found)}, expected {_name(built.dtype)}"


def _resized_base(path: str, state: Mapping[str, tuple[str, Tensor]], own: Mapping[str, Tensor]) -> Iterator[_Resized]:
    """The copies and biases that have another size in this base."""
    for name, (full, built) in state.items():
        if (name.startswith(_COPY) or name == _BIAS) and own[name].shape != built.shape:
            yield _Resized(path, full, tuple(own[name].shape), tuple(built.shape))


def _load_slot(path: str, slot: Slot, tensors: dict[str, Tensor]) -> list[str]:
    try:
        slot.load_state_dict(tensors)
    except RuntimeError as error:  # torch's way to report wrong shapes
        return [f"at {path}: {line.strip()}" for line in str(error).splitlines()[1:]]
    return []


def _refuse(problems: Sequence[str], resized: Sequence[_Resized], model: nn.Module, source: str, misfit: str) -> None:
    hint = labels_hint(model, [(each.saved, each.found) for each in resized])
    sizes = [f"at {cut(each.path, 200)}: {_sizes(each)}" for each in resized]
    if resized and not problems:
        title = f"{source} was trained on another base model: what it trains in full has other shapes (saved -> here)"
        raise BaseMismatchError("\n- ".join([f"{title}{hint}:", *first(sizes)]))
    if problems:
        raise FileError("\n- ".join([f"{source} {misfit}:", *first([*problems, *sizes])]))


def _sizes(each: _Resized) -> str:
    return f"{cut(each.name, 200)} {list(each.saved)} -> {list(each.found)}"


def _refuse_overflow(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `FileError` if a finite value of the file is too large for the precision in which it is used here."""
    cast = {
        name: value
        for path, slot in slots.items()
        for key, value in slot.state_dict().items()
        if value.dtype != tensors[name := join(path, key)].dtype
    }
    if wrong := nonfinite(cast, tensors):
        raise FileError(
            f"{source} has values that are too large for the precision of this model: {few(wrong, shown=5)} become "
            "infinite; load the base model in float32 or bfloat16"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
