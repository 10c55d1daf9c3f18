"""The scale of a module: PEFT's own rule, and what an engine makes of it."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import attrs

from tunerkit.plugin import FileError, TargetError, file_matchers
from tunerkit_serving.adapter_folder import CONFIG, Folder

if TYPE_CHECKING:
    from torch import Tensor

Scale = Callable[[str], float | None]
_SIMPLE: Final = re.compile(r"(?:[\w-]|\\?\.)+")  # no repeats: matching it takes linear time
_EQUAL: Final = 1e-6


def ratio(alpha: float, rank: int, *, stabilised: bool) -> float:
    """Return alpha/r, or alpha/√r for rank-stabilised LoRA."""
    return alpha / (rank**0.5 if stabilised else rank)


def peft_scale(folder: Folder) -> Callable[[str], float]:
    """Return PEFT's rule: alpha/r, or alpha/√r, where patterns may set alpha and r for some modules.

    Args:
        folder: The adapter.

    Returns:
        A function from a module's path to its scale.

    Raises:
        FileError: A pattern is malformed, or patterns take too many steps.
    """
    stabilised = folder.config.get("use_rslora") is True
    scales: dict[str, float] = {}
    ranks, alphas = _Table.of(folder, "rank_pattern"), _Table.of(folder, "alpha_pattern")
    for path in folder.pairs:
        rank = int(ranks.lookup(path, folder.r))
        scales[path] = ratio(alphas.lookup(path, folder.alpha), rank, stabilised=stabilised)
    return scales.__getitem__


@attrs.frozen
class _Table:
    """A mapping of PEFT's patterns to numbers. A pattern matches the end of a path, cut at a dot."""

    place: str
    rows: Sequence[tuple[Callable[[str], object], float]]

    @classmethod
    def of(cls, folder: Folder, key: str) -> "_Table":
        place = f"{folder.path / CONFIG}: {key}"
        table = folder.config.get(key) or {}
        whole = {pattern: rf"(.*\.)?({pattern})" for pattern in table}
        # A compact folder has a simple one for each module, hundreds of them.
        simple = {text: re.compile(text) for pattern, text in whole.items() if _SIMPLE.fullmatch(pattern)}
        try:
            others = file_matchers(text for text in whole.values() if text not in simple)
        except TargetError as problem:
            raise FileError(f"{place}: {problem}") from problem
        rows = [(others.get(text) or simple[text].fullmatch, table[pattern]) for pattern, text in whole.items()]
        return cls(place, rows)

    def lookup(self, path: str, default: float) -> float:
        """Return the value of the first pattern that matches, in the order of the file, as PEFT does."""
        try:
            return next((value for matches, value in self.rows if matches(path)), default)
        except TargetError as problem:
            raise FileError(f"{self.place}: {problem}") from problem


def misscaled(folder: Folder, scale: Scale) -> Iterator[str]:
    """Find the modules that an engine scales otherwise than PEFT.

    Args:
        folder: The adapter.
        scale: The engine's rule. None stands for a module that it leaves out, which is no matter of scale.

    Yields:
        A module with both scales.

    Raises:
        FileError: A pattern is malformed.
    """
    if not folder.is_lora:
        return
    right = peft_scale(folder)
    for path in folder.pairs:
        wanted, got = right(path), scale(path)
        if got is not None and abs(got - wanted) > _EQUAL * abs(wanted):
            yield f"{path} (times {got:g}, not {wanted:g})"


def scaled(folder: Folder, scale: Scale) -> "Mapping[str, Tensor]":
    """Return what is added to each weight: B·A times the scale. Modules without a scale are left out.

    Args:
        folder: The adapter.
        scale: The engine's rule.

    Returns:
        The change by the path of the module, with the shape of its weight.
    """
    scales = {path: scale(path) for path in folder.pairs}
    return {path: folder.product(path) * factor for path, factor in scales.items() if factor is not None}


def constant(value: float) -> Scale:
    """Return a rule that gives every module the same scale."""
    return functools.partial(_same, value)


def _same(value: float, path: str) -> float:
    return value
