"""Keeps what several checks of one method on one model need, such as a short training, so that it is done once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tunerkit_testing.cases import Case

Found = TypeVar("Found")

_KEPT: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Keep what `remembered` computes until the end of the block."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def remembered(
    compute: Callable[[Case, str, Mapping[str, object]], Found], case: Case, method: str, config: Mapping[str, object]
) -> Found:
    """Return what a function finds on a case. Inside `remembering` it is called once; its result must not be changed.

    Args:
        compute: The function.
        case: The model.
        method: The method's name.
        config: The method's settings.
    """
    kept = _KEPT.get()
    if kept is None:
        return compute(case, method, config)
    key = (compute, id(case), method, repr(sorted(config.items())))
    if key not in kept:
        kept[key] = case, compute(case, method, config)  # with the case, so that its id stays its own
    found: Found = kept[key][1]
    return found
