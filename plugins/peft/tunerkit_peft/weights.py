"""The tensors of a PEFT adapter: opened without reading them, and sorted by what they belong to."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tunerkit.errors import first, shown
from tunerkit.plugin import FileError

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
