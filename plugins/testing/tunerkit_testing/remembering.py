"""Keeps what several checks of one method on one model need, such as a short training, so that it is done once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from tunerkit import hooks
from tunerkit_testing.cases import Case, Check

Found = TypeVar("Found")

_KEPT: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def remembering(kept: dict[Any, Any] | None = None) -> Iterator[None]:
    """Keep what `remembered` computes until the end of the block.

    Args:
        kept: Where to keep it, for several blocks; a block that raises an error empties it.
    """
    kept = {} if kept is None else kept
    token = _KEPT.set(kept)
    try:
        yield
    except BaseException:
        kept.clear()
        raise
    finally:
        _KEPT.reset(token)


def forget() -> None:
    """Drop what is kept: a check that failed may have left a model merged, or otherwise changed."""
    if (kept := _KEPT.get()) is not None:
        kept.clear()


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
    # The next test may register another plugin with a method of this name.
    owner = hooks.registry.loaded().owners[hooks.registry.named(method)].plugin
    key = (compute, id(case), id(owner), method, repr(sorted(config.items())))
    if key not in kept:
        kept[key] = case, owner, compute(case, method, config)  # with what the ids are of, so that they stay theirs
    found: Found = kept[key][-1]
    return found


class Shared:
    """What the checks of one case have in common, from one test to the next; another case takes its place."""

    def __init__(self) -> None:
        self._case: Case | None = None
        self._kept: dict[Any, Any] = {}

    @contextmanager
    def on(self, case: Case) -> Iterator[None]:
        """Inside the block, keep what is `remembered`, and what was kept in the last one if it is of the same case."""
        if case is not self._case:
            self._case = case
            self._kept.clear()
        with remembering(self._kept):
            yield

    def check(self, check: Check) -> Check:
        """Return a check that shares what it needs with others."""

        @wraps(check)
        def sharing(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> str | None:
            with self.on(case):
                return check(case, method, config, tmp_path)

        return sharing
