"""Open an adapter of any format over the shapes of its base model: no weight of the base is read."""

import attrs
from torch import nn

import tunerkit
from tunerkit import BaseMismatchError, Tuner, serialization
from tunerkit_transformers.base_choice import choose_base, with_base
from tunerkit_transformers.bases import Base, skeleton, whole


@attrs.frozen(eq=False)
class Opened:
    """An adapter in its base model.

    Attributes:
        model: The base model with the adapter.
        tuner: The handle on the adapter.
        base: The base model.
    """

    model: nn.Module
    tuner: Tuner
    base: Base


def open_adapter(source: str, *, base: str | None, task: str | None, beside: str | None = None) -> Opened:
    """Open an adapter over its base on the meta device; its own tensors are on the CPU.

    Args:
        source: The adapter: a folder, a file, or a name that a format knows.
        base: The folder of the base, or its name on the hub; None for what the adapter's files say.
        task: The task of the adapter, if it does not follow from its files.
        beside: Another adapter of the same base, whose files may name it.

    Raises:
        FileError: There is no adapter, or its files are damaged, or it is of another base.
        ModelError: The base cannot be found.
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


def load_base(base: Base, *, keep_dtype: bool = False) -> nn.Module:
    """Load the base with its weights: in fp32, or in the dtype of its files."""
    return whole(base, dtype="auto") if keep_dtype else whole(base)
