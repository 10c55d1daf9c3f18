"""Open an adapter of any format over its base model, with the base's weights or without, and collect our warnings."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn

import tunerkit
from tunerkit import BaseMismatchError, Tuner, TunerkitWarning, serialization
from tunerkit_transformers.base_choice import choose_base, with_base
from tunerkit_transformers.bases import Base, skeleton
from tunerkit_transformers.pretrained import quiet


@attrs.frozen(eq=False)
class Opened:
    """An adapter in its base model: the model with the adapter, the handle on the adapter, and the base."""

    model: nn.Module
    tuner: Tuner
    base: Base


def open_adapter(source: str, *, base: str | None, task: str | None, beside: str | None = None) -> Opened:
    """Open an adapter over its base on the meta device; its own tensors are on the CPU. No weight of the base is read.

    ``base`` and ``task`` are for what its files do not say; those of ``beside``, another adapter of the same base, may
    name it too. Raises `FileError` if there is no adapter, or a damaged one, or one of another base; and `ModelError`
    if the base cannot be found.
    """
    chosen = choose_base(source, base=base, task=task, beside=beside)
    model = skeleton(chosen)
    try:
        serialization.open_unloaded(model, source)
    except BaseMismatchError as problem:
        raise with_base(problem, chosen, model, source) from problem
    return Opened(model, tunerkit.tuner(model), chosen)


def load_adapter(model: nn.Module, source: str, base: Base) -> nn.Module:
    """Put an adapter into its base, which has its weights. Raises `FileError` as `tunerkit.load` does."""
    try:
        return tunerkit.load(model, source)
    except BaseMismatchError as problem:
        raise with_base(problem, base, model, source) from problem


@contextmanager
def collected() -> Iterator[list[str]]:
    """Yield a list that gets each of our own warnings inside the block, once and as one line.

    The libraries are quiet from then on, and their warnings are left out.
    """
    found: list[str] = []

    def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        lines = str(message).replace(":\n- ", ": ").splitlines()
        text = "; ".join(line.removeprefix("- ").strip() for line in lines)
        if issubclass(category, TunerkitWarning) and text not in found:
            found.append(text)

    quiet()
    with warnings.catch_warnings():  # restores showwarning too
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield found
