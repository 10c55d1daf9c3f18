"""Sizes that fit a layer: by default the nearest that does, and a refusal of a given one that does not."""

import warnings
from collections.abc import Iterable
from math import gcd

from tunerkit.errors import TargetError, TunerkitWarning


def at_most(given: int | None, default: int, limit: int, what: str) -> int:
    """Return a size that must not exceed a limit.

    Args:
        given: The setting; None takes the default, or the limit where that is smaller.
        default: The default.
        limit: The largest size that fits the layer.
        what: The setting's name and what limits it, for the error: ``"rank, the smaller side of the layer"``.

    Raises:
        TargetError: The given size is above the limit.
    """
    if given is not None and given > limit:
        name, _, why = what.partition(", ")
        raise TargetError(f"{name} is {given}, and at most {limit} fits here ({why}); lower it or leave it out")
    return min(default, limit) if given is None else given


def divisor(given: int | None, default: int, of: int, what: str, *, least: int = 1, step: int = 1) -> int:
    """Return a size that must divide another.

    Args:
        given: The setting; None takes the largest divisor up to the default.
        default: The default.
        of: The size that it must divide.
        what: The setting's name and what it divides, for the error: ``"blocks, the outputs"``.
        least: The smallest size that the error names.
        step: What the sizes that the error names exceed the least by is a multiple of this.

    Raises:
        TargetError: The given size does not divide the other.
    """
    if given is None:
        return next(size for size in range(min(default, of), 0, -1) if of % size == 0)
    if of % given:
        name, _, why = what.partition(", ")
        fitting = [size for size in range(least, of + 1, step) if of % size == 0]
        near = ", ".join(map(str, sorted(sorted(fitting, key=lambda size: abs(size - given))[:4])))
        raise TargetError(f"{name} is {given}, which does not divide {of} ({why}); {near} do, or leave it out")
    return given


def common_divisor(given: int | None, default: int, of: Iterable[int], what: str) -> int:
    """Return a size that must divide several others, and warn if no size above 1 does.

    Args:
        given: The setting; None takes the largest divisor up to the default.
        default: The default.
        of: The sizes that it must divide.
        what: The setting's name and what it divides, for the error: ``"block_size, both sides of the layer"``.

    Raises:
        TargetError: The given size does not divide the others.
    """
    size = divisor(given, default, gcd(*of), what)
    if given is None and size == 1:
        name, _, why = what.partition(", ")
        message = (
            f"{name} is 1, because nothing above 1 divides {why}. That takes many parameters: leave such layers out"
        )
        warnings.warn(message, TunerkitWarning, stacklevel=2)
    return size
