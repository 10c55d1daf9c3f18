"""The tensors of a PEFT file: opened unread, sorted by what they belong to, and checked to fit together."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tunerkit.errors import first, shown
from tunerkit.plugin import Factors, FileError
from tunerkit_peft.paths import Place, Rename, place_of
from tunerkit_peft.settings import Settings

PREFIX: Final = "base_model.model."
MODEL: Final = "base_model."  # what all targets share lies here
_MATRIX: Final = re.compile(
    r"(?:(?P<path>.+)\.)?(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B)(?:\.(?P<rest>.+))?"
)
# PEFT's buffer for the gradients of VeLoRA; the forward does not use it.
_UNUSED: Final = ("lora_velora_embed", "ranknum")
_REAL: Final = ("F64", "F32", "F16", "BF16")
_UNREADABLE: Final = (SafetensorError, OSError, ValueError, RuntimeError, TypeError)


@attrs.frozen(eq=False)
class Turned:
    """A tensor that is computed from some of the file."""

    shape: tuple[int, ...]
    compute: Callable[[], Tensor]


@attrs.frozen(eq=False)
class Weights:
    """The tensors of one adapter, which stay in the file until they are asked for.

    Attributes:
        file: The file.
        factors: The names of the tensors of each adapted module, by its path and by part: of a LoRA ``"A"`` and
            ``"B"``, and ``"E"`` for AdaLoRA's λ.
        others: The names of all other tensors, by their names without PEFT's prefix.
        shared: The names of the tensors that all targets share, by part.
        turned: Those by their names that are used in another form than the file has.
    """

    file: Path
    factors: dict[str, dict[str, str]]
    others: dict[str, str]
    shared: dict[str, str]
    _opened: Any
    turned: Mapping[str, Turned] = attrs.field(factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        if name in self.turned:
            return self.turned[name].shape
        return tuple(self._opened.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read a tensor in the dtype of the file.

        Raises:
            FileError: The file is damaged.
        """
        if name in self.turned:
            return self.turned[name].compute()
        try:
            found: Tensor = self._opened.get_tensor(name)
        except _UNREADABLE as error:
            raise _damaged(self.file, error) from error
        return found

    def matrix(self, name: str) -> Tensor:
        """Read A, B or λ as an fp32 matrix: a convolution's has its kernel flattened."""
        return self.tensor(name).flatten(1).to(torch.float32)


@attrs.frozen
class Kind:
    """How the tensors of one type of adapter are known.

    Attributes:
        what: What the file should hold, for an error.
        first: A name that every such file has, for an error.
        find: Gives the module's path and the part for a tensor's name without PEFT's prefix; None for other tensors.
        find_shared: Gives the part for the name of a tensor that all targets share; None for other tensors.
        integers: The parts that are integers, with their types in a file.
    """

    what: str
    first: str
    find: Callable[[str], tuple[str, str] | None]
    find_shared: Callable[[str], str | None] = lambda name: None
    integers: Mapping[str, str] = attrs.field(factory=dict)


def _of_lora(name: str) -> tuple[str, str] | None:
    found = _MATRIX.fullmatch(name)
    if found is None or _is_bias(found["rest"]):
        return None
    return found["path"] or "", found["part"][-1]


LORA: Final = Kind("one LoRA or AdaLoRA", "lora_A", _of_lora)


def open_weights(file: Path, kind: Kind = LORA) -> Weights:
    """Open a file of tensors, and sort their names. The values are not read.

    Raises:
        FileError: The file is damaged, or holds a tensor that tunerkit does not know.
    """
    try:
        opened: Any = safe_open(file, framework="pt", device="cpu")  # Any: its methods are not annotated
        keys = list(opened.keys())
        types = {key: opened.get_slice(key).get_dtype() for key in keys}
    except _UNREADABLE as error:
        raise _damaged(file, error) from error
    prefix = PREFIX if any(key.startswith(PREFIX) for key in keys) else ""
    factors: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    shared: dict[str, str] = {}
    problems: list[str] = []

    def add(own: dict[str, str], part: str, key: str) -> None:
        if part in own:
            problems.append(f"{shown(key)} and {shown(own[part])} are the same matrix; there may be two adapters")
        own[part] = key
        problems.extend(_wrong_number(key, types[key], kind.integers.get(part, "")))

    for key in keys:
        name = key.removeprefix(prefix)
        if (part := kind.find_shared(key.removeprefix(MODEL))) is not None:
            add(shared, part, key)
        elif not key.startswith(prefix):
            problems.append(f"{shown(key)} does not begin with {prefix!r} as the others do")
        elif found := kind.find(name):
            add(factors.setdefault(found[0], {}), found[1], key)
        elif not any(each in name.split(".") for each in _UNUSED):
            others[name] = key
    if problems:
        raise FileError("\n- ".join([f"{file} does not hold {kind.what}:", *first(problems)]))
    if not factors:
        held = f"; it holds {shown(keys[0])}" if keys else ""
        raise FileError(f"{file} holds no adapter: none of its {len(keys)} tensors is called {kind.first}{held}")
    return Weights(file, factors, others, shared, opened)


def _is_bias(rest: str | None) -> bool:
    """Whether what follows ``lora_B`` names a bias. Else it is ``weight``, an adapter's name, or both."""
    return rest is not None and rest.split(".")[-1] == "bias"


def _wrong_number(key: str, kind: str, integers: str) -> Iterator[str]:
    if kind not in (allowed := (integers,) if integers else _REAL):
        yield f"{shown(key)} is of type {kind}, expected {'' if integers else 'one of '}{', '.join(allowed)}"


def _damaged(file: Path, error: Exception) -> FileError:
    return FileError(
        f"{file} cannot be read as a safetensors file: {error}. It may be incomplete: copy or download it again"
    )


@attrs.frozen(eq=False)
class Read:
    """An adapter as its method holds it.

    Attributes:
        factors: The products by target path, computed when they are asked for.
        config: The method's settings.
        tensors: The tensors of the method's adapters, by target path.
        shared: The tensors that they share.
    """

    factors: Mapping[str, Factors]
    config: Mapping[str, object]
    tensors: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class Adapted:
    """What a file has at the targets, before it is compared with the model.

    Attributes:
        paths: The paths of the targets.
        takes: Whether PEFT adapts a module by this type.
        contradictions: What does not fit the modules, on any base.
        mismatches: What another base model would explain.
        read: Reads the tensors.
        remarks: What the settings say and the adapter will not hold.
        beside: Those of the paths that ``target_modules`` need not name: PEFT finds them in another way.
    """

    paths: Sequence[str]
    takes: Callable[[nn.Module], bool]
    contradictions: Sequence[str]
    mismatches: Sequence[str]
    read: Callable[[], Read]
    remarks: Sequence[str]
    beside: Collection[str] = ()


class Lazy(Mapping[str, Factors]):
    """Products that are computed each time they are asked for: all at once would hold the adapter a second time."""

    def __init__(self, compute: Mapping[str, Callable[[], Factors]]) -> None:
        self._compute = compute

    def __getitem__(self, path: str) -> Factors:
        return self._compute[path]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._compute)

    def __len__(self) -> int:
        return len(self._compute)


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
