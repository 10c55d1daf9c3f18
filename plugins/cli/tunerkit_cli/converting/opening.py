"""Open an adapter of any format over its base, with its weights or without."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

import tunerkit
from tunerkit import serialization
from tunerkit.errors import BaseMismatchError
from tunerkit.plugin import Tuner
from tunerkit_cli.telling import one_line, own_warnings
from tunerkit_transformers.base_choice import choose_base, with_base
from tunerkit_transformers.bases import Base, skeleton, whole
from tunerkit_transformers.pretrained import quiet


def open_adapter(source: str, *, base: str | None, task: str | None, beside: str | None = None) -> tuple[Tuner, Base]:
    """Open an adapter over its base on the meta device; ``beside`` is another of the same base, which may name it."""
    chosen = choose_base(source, base=base, task=task, beside=beside)
    model = skeleton(chosen)
    try:
        serialization.open_unloaded(model, source)
    except BaseMismatchError as problem:
        raise with_base(problem, chosen, model, source) from problem
    except NotImplementedError:  # torch's answer to a method that reads the base's values, which are not loaded
        model = load_adapter(whole(chosen, dtype="auto"), source, chosen)
    return tunerkit.tuner(model), chosen


def load_adapter(model: nn.Module, source: str, base: Base) -> nn.Module:
    """Put an adapter into its base, which has its weights. Raises `FileError` as `tunerkit.load` does."""
    try:
        return tunerkit.load(model, source)
    except BaseMismatchError as problem:
        raise with_base(problem, base, model, source) from problem


@contextmanager
def collected() -> Iterator[list[str]]:
    """Yield a list that gets each of our own warnings inside the block, once and as one line; libraries are quiet."""
    found: list[str] = []
    quiet()
    with own_warnings(lambda message: found.append(one_line(message))):
        yield found
