"""The scale of a module: PEFT's own rule, and what an engine makes of it."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import attrs

from tunerkit import FileError, TargetError
from tunerkit.patterns import Matcher, matcher, one_allowance
from tunerkit_serving.adapter_folder import CONFIG, Folder

if TYPE_CHECKING:
    from torch import Tensor

Scale = Callable[[str], float | None]
_SIMPLE: Final = re.compile(r"(?:[\w-]|\\?\.)+")  # no repeats: matching it takes linear time
_LONGEST: Final = 900  # characters: longer ones are refused, as everywhere in tunerkit
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
        FileError: A pattern is malformed, or patterns take longer than a second.
    """
    stabilised = folder.config.get("use_rslora") is True
    scales: dict[str, float] = {}
    with one_allowance():
        ranks, alphas = _Table.of(folder, "rank_pattern"), _Table.of(folder, "alpha_pattern")
        for path in folder.pairs:
            rank = int(ranks.lookup(path, folder.r))
            scales[path] = ratio(alphas.lookup(path, folder.alpha), rank, stabilised=stabilised)
    return scales.__getitem__


@attrs.frozen
class _Table:
    """A mapping of PEFT's patterns to numbers. A pattern matches the end of a path, cut at a dot."""

    place: str
    rows: Mapping[str, tuple[Matcher, float]]

    @classmethod
    def of(cls, folder: Folder, key: str) -> "_Table":
        place = f"{folder.path / CONFIG}: {key}"
        return cls(place, {k: (_matcher(place, k), value) for k, value in (folder.config.get(key) or {}).items()})

    def lookup(self, path: str, default: float) -> float:
        """Return the value of the first pattern that matches, in the order of the file, as PEFT does."""
        try:
            return next((value for matches, value in self.rows.values() if matches(path)), default)
        except TargetError as problem:
            raise FileError(f"{self.place}: {problem}") from problem


def _matcher(place: str, key: str) -> Matcher:
    expression = rf"(.*\.)?({key})"
    # A compact folder has one for each module: too many for the second that patterns share.
    if len(key) <= _LONGEST and _SIMPLE.fullmatch(key):
        compiled = re.compile(expression)
        return lambda path: compiled.fullmatch(path) is not None
    try:
        return matcher("re:" + expression)
    except TargetError as problem:
        raise FileError(f"{place}: {problem}") from problem


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
