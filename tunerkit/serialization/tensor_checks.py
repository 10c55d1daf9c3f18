"""Check a file's tensors, which must be finite and fit their slots, and limit the memory that a config allocates."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunerkit import hooks
from tunerkit.errors import BaseMismatchError, ConfigError, FileError, TunerkitError, cut, first
from tunerkit.injection import Slot
from tunerkit.layers import weights
from tunerkit.paths import CHILD, few, join
from tunerkit.records import Resized, Target

_Shapes = tuple[Sequence[int], Sequence[int]]  # in the file, and in this model
_NOTHING: Mapping[str, Tensor] = {}
_TO_READ = (
    "A model with them gives no useful output: load an earlier file. To inspect this one, read its tensors with "
    "safetensors.torch.load_file, or with the program that wrote it"
)
# Interchangeable dtypes: a base or an adapter may be loaded in another precision than it was saved in.
_PRECISIONS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
# Allowance for a plugin's temporary tensors, such as a factorization of the weight in float64.
_FACTOR, _ALWAYS = 4, 2**20
# Larger allowance for a new adapter, whose temporary tensors may exceed its layers, such as the ΔW of each triplet.
_NEW = 2**26
# Functions that take a size, which is checked before the call. Other functions are checked by their results.
_FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.normal}
    | {torch.randperm, torch.arange, torch.randint, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones}
    | {Tensor.new_full, Tensor.repeat, Tensor.resize_}
)


# --- Finite -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nonfinite(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] = _NOTHING) -> list[str]:
    """Return the names of tensors with NaN or inf where ``base`` has none, with one transfer per device."""
    checks: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        inexact = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        if inexact and tensor.numel() and not tensor.is_meta:
            real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            comparable = real.float() if real.dtype.itemsize == 1 else real  # 8-bit floats cannot be compared
            # `aminmax` propagates NaN. It takes one pass and no memory, unlike `isfinite().all()`.
            checks[tensor.device][name] = torch.stack(torch.aminmax(comparable)).isfinite().all()
    found: set[str] = set()
    for own in checks.values():
        finite = torch.stack([*own.values()]).tolist()
        found.update(name for name, is_finite in zip(own, finite, strict=True) if not is_finite)
    return [name for name in tensors if name in found and not _repeats(tensors[name], base.get(name))]


def _repeats(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether ``base`` has the same value wherever ``tensor`` is not finite."""
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
    """Raise ``error`` if tensors contain NaN or inf where ``base`` has none; ``then`` is the advice to the user."""
    if wrong := nonfinite(tensors, base):
        raise error(f"{what} has NaN or inf in {len(wrong)} of {len(tensors)} tensors: {few(wrong, shown=5)}. {then}")


# --- Fitting ----------------------------------------------------------------------------------------------------------


def fill(
    slots: Iterable[tuple[str, Slot]], tensors: Mapping[str, Tensor], model: nn.Module, source: str
) -> dict[str, Slot]:
    """Copy a file's tensors into slots, one slot at a time as the iterator builds it; return the slots by module path.

    Raises `FileError` if tensors are missing, unexpected, misshapen, of a wrong dtype, or too large for the slots'
    precision; `BaseMismatchError` if only modules trained in full have other shapes in this base.
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
        title = f"{source} was trained on another base model: modules trained in full have other shapes (saved -> here)"
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
    """Yield (message, shapes) for each misfit. Shapes are (saved, here) for copies and biases, else None."""
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
    large: Sequence[str], targets: Sequence[Target], tensors: Mapping[str, Tensor] = _NOTHING, source: str = ""
) -> Callable[[Target], "AllocationLimit"]:
    """Return a function from a target to the limit on its adapter's tensors; ``large`` are paths of large settings.

    Only a config with large numbers needs a limit, which slows each call of torch. A new adapter has no ``source``.
    """
    held: Counter[str] = Counter()
    for name, tensor in tensors.items():
        path, of_shared, _ = name.partition(f".{CHILD}.")
        held[path if of_shared else name.rpartition(".adapter.")[0]] += tensor.numel()
    # Integers may pack two weights in a byte. Tensors that adapters share may have the size of the largest target.
    own = [chain(each.module.parameters(), each.module.buffers()) for each in targets]
    size = [[math.prod(weights.whole_shape(t)) * (t.is_floating_point() or 2 * t.itemsize) for t in ts] for ts in own]
    largest = max(map(sum, size), default=0)

    def limited(target: Target) -> AllocationLimit:
        def refusal(elements: int) -> TunerkitError:
            text = f"the adapter at {cut(target.path, 200)!r} needs a tensor of {elements:,} numbers, and the"
            if source:
                there = f"{text} file has {held[target.path]:,} for it"
                return FileError(f"{source} does not fit its own header: by its config, {there}")
            return ConfigError([f"{text} largest target has {largest:,}; lower the number @ {few(large, shown=5)}"])

        most = _FACTOR * (held[target.path] + largest) + _ALWAYS
        return AllocationLimit(most if source else max(most, _NEW), refusal)

    return limited


class AllocationLimit(TorchFunctionMode):
    """While active, raises ``refusal(elements)`` if a call of torch makes a tensor with more than ``most`` elements."""

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
    """Return how to resize the model to an adapter's shapes, as the end of a sentence; "" if no plugin knows."""
    return next(filter(None, (library.resize_hint(model, resized) for library in hooks.libraries_of(model))), "")
