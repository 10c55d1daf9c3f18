"""Check a file's tensors: that they are finite, fit the slots that they fill, and are in proportion to the config."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunerkit import hooks
from tunerkit.config import numbers_in
from tunerkit.errors import BaseMismatchError, ConfigError, FileError, TunerkitError, cut, first
from tunerkit.injection import Slot
from tunerkit.layers import weights
from tunerkit.paths import CHILD, few, join
from tunerkit.records import Resized, Target

_Shapes = tuple[Sequence[int], Sequence[int]]  # in the file, and in this model
_NOTHING: Mapping[str, Tensor] = {}
_TO_READ = (
    "A model with them computes nothing useful: load an earlier file. To look at this one, read its tensors with "
    "safetensors.torch.load_file, or with the program that wrote it"
)
# One of these may replace another: a base or an adapter may be held in another precision than it was saved in.
_PRECISIONS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
# A plugin may make tensors that it does not keep, such as a factor of the weight in float64.
_FACTOR, _ALWAYS = 4, 2**20
# A new adapter may also make tensors out of proportion to its layers, such as the ΔW of each triplet.
_NEW = 2**26
# A rank or a number of steps up to this is nothing unusual, whatever the tensors are like.
_USUAL = 1024
# The functions that are given a size. Others are checked by their results.
_FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.normal}
    | {torch.randperm, torch.arange, torch.randint, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones}
    | {Tensor.new_full, Tensor.repeat, Tensor.resize_}
)


# --- Finite -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nonfinite(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] = _NOTHING) -> list[str]:
    """Names of the tensors with NaN or inf that ``base`` does not have there too, with one transfer per device."""
    checks: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        inexact = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        if inexact and tensor.numel() and not tensor.is_meta:
            real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            comparable = real.float() if real.dtype.itemsize == 1 else real  # 8-bit floats cannot be compared
            # The extremes of a tensor with a NaN are NaN. This takes one pass and no memory, unlike `isfinite().all()`.
            checks[tensor.device][name] = torch.stack(torch.aminmax(comparable)).isfinite().all()
    found: set[str] = set()
    for own in checks.values():
        finite = torch.stack([*own.values()]).tolist()
        found.update(name for name, is_finite in zip(own, finite, strict=True) if not is_finite)
    return [name for name in tensors if name in found and not _repeats(tensors[name], base.get(name))]


def _repeats(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether the values that are not finite are the base's own."""
    if base is None or base.shape != tensor.shape or base.is_meta:
        return False
    base = base.to(tensor.device)
    return bool((tensor.isfinite() | (tensor == base) | (tensor.isnan() & base.isnan())).all())


def refuse_nonfinite(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    what: str,
    then: str = _TO_READ,
    error: type[TunerkitError] = FileError,
) -> None:
    """Raise ``error`` if tensors contain NaN or inf where the base's own do not; ``then`` says what to do."""
    if wrong := nonfinite(tensors, base):
        raise error(f"{what} has NaN or inf in {len(wrong)} of {len(tensors)} tensors: {few(wrong, shown=5)}. {then}")


# --- Fitting ----------------------------------------------------------------------------------------------------------


def fill(
    slots: Iterable[tuple[str, Slot]], tensors: Mapping[str, Tensor], model: nn.Module, source: str
) -> dict[str, Slot]:
    """Copy a file's tensors into slots, each as soon as it comes, and return the slots by path.

    Raises `FileError` if tensors are missing, unexpected, misshapen, of another kind, or not finite in the slots'
    precision; `BaseMismatchError` if only what is trained in full has another size in this base.
    """
    filled: dict[str, Slot] = {}
    problems: list[str] = []
    resized: dict[str, _Shapes] = {}
    used: set[str] = set()
    cast: list[tuple[str, Slot]] = []
    for path, slot in slots:
        state = {join(path, name): built for name, built in slot.state_dict().items()}
        used.update(state)
        misfits = dict(_misfits(path, state, tensors))
        problems += [line for line, shapes in misfits.items() if shapes is None]
        resized |= {line: shapes for line, shapes in misfits.items() if shapes is not None}
        if not misfits:
            problems += _load_slot(path, slot, {name: tensors[name] for name in state})
        if not (problems or resized):
            filled[path] = slot
            if any(built.dtype != tensors[name].dtype for name, built in state.items()):
                cast.append((path, slot))
    problems += [f"unexpected: {name}" for name in tensors if name not in used]
    if problems:
        raise FileError(
            "\n- ".join([f"{source} does not fit its own header or this model:", *first([*problems, *resized])])
        )
    if resized:
        title = f"{source} was trained on another base model: what it trains in full has other shapes (saved -> here)"
        raise BaseMismatchError(
            "\n- ".join([f"{title}{resize_hint(model, list(resized.values()))}:", *first([*resized])])
        )
    values = {join(path, name): value for path, slot in cast for name, value in slot.state_dict().items()}
    if wrong := nonfinite(values, tensors):
        raise FileError(
            f"{source} has values that are too large for the precision of this model: {few(wrong, shown=5)} become "
            "infinite; load the base model in float32 or bfloat16"
        )
    return filled


def _misfits(
    path: str, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, _Shapes | None]]:
    """Yield what does not fit a slot, with both shapes where this base has another size; an adapter checks its own."""
    for name, built in state.items():
        if name not in tensors:
            yield f"missing: {name}", None
            continue
        found = tensors[name]
        saved, here = list(found.shape), list(built.shape)
        if found.dtype != built.dtype and not {found.dtype, built.dtype} <= _PRECISIONS:
            kinds = [str(dtype).removeprefix("torch.") for dtype in (found.dtype, built.dtype)]
            yield f"{cut(name, 200)} is {kinds[0]}, expected {kinds[1]}", None
        elif saved != here and (name.startswith(join(path, "copy.")) or name == join(path, "bias")):
            yield f"at {cut(path, 200)}: {cut(name, 200)} {saved} -> {here}", (saved, here)


def _load_slot(path: str, slot: Slot, tensors: Mapping[str, Tensor]) -> list[str]:
    try:
        slot.load_state_dict({name.removeprefix(join(path, "")): tensor for name, tensor in tensors.items()})
    except RuntimeError as error:  # torch's way to report wrong shapes
        return [f"at {path}: {line.strip()}" for line in str(error).splitlines()[1:]]
    return []


# --- In proportion ----------------------------------------------------------------------------------------------------


def limit_for(
    config: Mapping[str, object], targets: Sequence[Target], tensors: Mapping[str, Tensor] = _NOTHING, source: str = ""
) -> Callable[[Target], AbstractContextManager[object]]:
    """Return what to enter while the adapter of a target is built: an `AllocationLimit`, or nothing if none is needed.

    The limit costs time in every call of torch, and a config with no number above the dimensions in the file needs
    none. A new adapter has no ``source``.
    """
    usual = max([_USUAL, *(size for tensor in tensors.values() for size in tensor.shape)])
    settings = [(name, value) for name, value in config.items() if value and not isinstance(value, str)]
    numbers = (found for name, value in settings for found in numbers_in(value, f"$.{name}"))
    if not (large := [path for path, number in numbers if number > usual]):
        return nullcontext
    held: Counter[str] = Counter()
    for name, tensor in tensors.items():
        path, of_shared, _ = name.partition(f".{CHILD}.")
        held[path if of_shared else name.rpartition(".adapter.")[0]] += tensor.numel()
    # Integers may pack several weights, two in each byte. What all adapters share may be made for the largest target.
    own = [chain(each.module.parameters(), each.module.buffers()) for each in targets]
    size = [[math.prod(weights.whole_shape(t)) * (t.is_floating_point() or 2 * t.itemsize) for t in ts] for ts in own]
    largest = max(map(sum, size), default=0)

    def limited(target: Target) -> AllocationLimit:
        def refusal(elements: int) -> TunerkitError:
            text = f"the adapter at {cut(target.path, 200)!r} needs a tensor of {elements:,} numbers, and the"
            if source:
                there = f"{text} file has {held[target.path]:,} for it"
                return FileError(f"{source} does not fit its own header: by its config, {there}")
            return ConfigError([f"{text} largest target has {largest:,}; lower it @ {few(large, shown=5)}"])

        most = _FACTOR * (held[target.path] + largest) + _ALWAYS
        return AllocationLimit(most if source else max(most, _NEW), refusal)

    return limited


class AllocationLimit(TorchFunctionMode):
    """Rejects calls of torch with more than ``most`` elements while an adapter is built: what a config may ask for."""

    def __init__(self, most: int, refusal: Callable[[int], TunerkitError]) -> None:
        super().__init__()
        self._most, self._refusal = most, refusal

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            given = [*args, kwargs.get("size")]
            counts = [arg for arg in args if type(arg) is int]
            counts = (2 * counts)[:2] if func is torch.eye else counts  # a square, unless it has two sizes
            sizes = next((arg for arg in given if isinstance(arg, list | tuple)), counts)
            self._refuse_above(math.prod(abs(size) for size in sizes if isinstance(size, int)))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._refuse_above(result.numel())
        return result

    def _refuse_above(self, elements: int) -> None:
        if elements > self._most:
            raise self._refusal(elements)


def resize_hint(model: nn.Module, resized: Sequence[Resized]) -> str:
    """How to load a model in the sizes that an adapter needs, as the end of a sentence; empty if no library knows."""
    return next(filter(None, (library.resize_hint(model, resized) for library in hooks.gather_libraries())), "")
