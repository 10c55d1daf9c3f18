"""What hooks see of a training: the engine, by which processes hold adapters and keep them alike, and the tuner."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.config import AdapterConfig
from tunerkit.layers import Adapter
from tunerkit.records import Target

_FIXED = "torch.distributed is initialised, and DDP and FSDP do not allow shapes to change"


@attrs.frozen(eq=False)
class Pieces:
    """What this process holds of parameters: all of them, unless an engine has cut them.

    Attributes:
        values: What it holds of each parameter: the memory itself.
        grads: What it holds of their gradients; None for a parameter without one.
        starts: The dimension along which each is cut, and the first index of the piece in it.
        are_cut: Whether other processes hold other pieces.
    """

    values: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    starts: Sequence[tuple[int, int]]
    are_cut = False

    def sum_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Replace tensors by their sums over the processes that share the parameters. One collective for all.

        Args:
            tensors: Tensors of the same shapes in all processes.
            what: What they are, for messages.
        """

    def joined(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """Put whole tensors together. All processes must call this.

        Args:
            tensors: One for each parameter, cut as that is.
            what: What they are, for messages.
        """
        return list(tensors)

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Cut whole tensors, one for each parameter, as the parameters are, into views. No collective."""
        return list(tensors)


def whole_pieces(parameters: Sequence[Tensor]) -> Pieces:
    """The pieces of parameters that are whole."""
    return Pieces(parameters, [parameter.grad for parameter in parameters], [(0, 0)] * len(parameters))


class Removable(Protocol):
    """The handle of something registered."""

    def remove(self) -> None:
        """Undo it. Calling this again does nothing."""


class Engine:
    """How adapters are spread over the processes of one training. Derive from it; the defaults are for one process.

    A method's hooks see whole parameters with whole gradients, whatever the engine does with them between steps. The
    same calls are made in all processes, in the same order.

    Attributes:
        name: What messages call it.
        is_shared: Whether the processes train one adapter together, so that one of them writes for all. It should
            reject an optimizer that decides by the loss, of which each process has its own.
        is_writer: Whether this process writes the files of the training. The others return when they are there.
        withholds: Whether a parameter without a gradient is left alone by the optimizer's step.
        splits: Whether a process holds only a part of an adapter, so that all must take part when it is read.
        gives_pieces: Whether a method that works on pieces gets those of parameters that are cut.
        fixed_shapes: Why a parameter's shape must not change; None if it may, in all processes alike.
    """

    is_shared = False
    withholds = True
    gives_pieces = False

    @property
    def name(self) -> str:
        return "one process"

    @property
    def fixed_shapes(self) -> str | None:
        return _FIXED if in_group() else None

    @property
    def splits(self) -> bool:
        return False

    @property
    def is_writer(self) -> bool:
        return True

    # Any: tunerkit.plugin.Tuner, which is defined on top of this.
    def begin_(self, adapters: Sequence[Any], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Compare the adapters of all processes, make them start alike, and register what keeps them alike.

        Raises `StepError` in every process if they differ. Nothing is changed then.

        Args:
            adapters: The handles on them, with the length of this training in ``total_steps``.
            optimizer: What steps them; None if it takes no hooks.

        Returns:
            The handles of what it registered for each adapter, by its name; removing them ends it.
        """
        return {}

    def before_step_(self, optimizer: Optimizer) -> None:
        """Note that the optimizer is about to step. Raises `StepError` if the processes are not at the same step."""

    def no_sync(self) -> AbstractContextManager[object]:
        """Inside the block, backwards only add up this process's gradients, if that is up to the engine."""
        return nullcontext()

    def whole(
        self, slots: Sequence[nn.Module], *, gradients: bool
    ) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Inside the block, the parameters below ``slots`` are whole, in the same modules and under the same names.

        What the block changes in them, and in their gradients, is kept.

        Args:
            slots: The adapter's modules.
            gradients: Whether their gradients are needed too, which costs a second exchange.

        Returns:
            A context manager. It gives a function from a parameter inside the block to the one outside of it.
        """
        return nullcontext(same)

    def reshard_(self) -> None:
        """Cut the adapters again if a forward has left them whole, so that `pieces` can be asked. No collective."""

    def pieces(self, parameters: Sequence[nn.Parameter]) -> Pieces:
        """What this process holds of the adapters' parameters: of whole ones, as inside `whole`, all. No collective."""
        return whole_pieces(parameters)

    def resized_(self) -> None:
        """Note that parameters have changed shape, in all processes alike, between two backwards."""

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Give the values that tensors have in process 0 to all processes.

        Args:
            tensors: Tensors of the same shapes in all processes.
            what: What they are, for messages.
        """

    def write_once(self, place: Path, content: str, write: Callable[[], Path]) -> Path:
        """Let one process write a file, and return in every process once it is there.

        Args:
            place: The file, as this process was told.
            content: What is written, in the same words in all processes if it is the same.
            write: Writes the file, and returns its path. It is called in the process that `is_writer`.
        """
        return write()


class TunerView(Protocol):
    """The handle on one adapter of a wrapped model, as hooks see it; `tunerkit.plugin.Tuner` implements it.

    ``state`` belongs to the method: `tunerkit_start` returns it, and only `tunerkit_restore` may replace it.
    """

    name: str
    method: str
    config: AdapterConfig
    targets: tuple[Target, ...]
    state: object | None
    engine: Engine

    @property
    def steps(self) -> int: ...

    @property
    def total_steps(self) -> int | None: ...

    def adapters(self) -> dict[str, Adapter]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def whole(self, *, gradients: bool = False) -> AbstractContextManager[Callable[[Tensor], Tensor]]: ...

    def pieces(self, parameters: Sequence[nn.Parameter]) -> Pieces: ...

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None: ...

    def ranks(self) -> dict[str, int]: ...


def in_group() -> bool:
    """Whether this process belongs to a process group; there may be no other one in it."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def same(parameter: Tensor) -> Tensor:
    """The parameter itself."""
    return parameter
