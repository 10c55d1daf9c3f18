"""The interfaces between core and hooks: the engine, which shards or synchronizes adapters, and the tuner."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import attrs
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from tunerkit.config import AdapterConfig
from tunerkit.layers import Adapter
from tunerkit.records import Target

_FIXED = "torch.distributed is initialized, and DDP and FSDP do not allow shapes to change"


@attrs.frozen(eq=False)
class Pieces:
    """This process's shards of parameters; the full parameters if no engine shards them.

    Attributes:
        values: The shard of each parameter: a view, not a copy.
        grads: The shard of each parameter's gradient; None for a parameter without a gradient.
        starts: The dimension along which each parameter is sharded, and the shard's first index in it.
        are_cut: Whether the parameters are sharded.
    """

    values: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    starts: Sequence[tuple[int, int]]
    are_cut = False

    def sum_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Sum tensors in place over the processes that share the parameters, in one collective.

        Args:
            tensors: Tensors of the same shapes in all processes.
            what: A name for the tensors, for messages.
        """

    def joined(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """Gather full tensors from their shards. All processes must call this.

        Args:
            tensors: The shard of a tensor for each parameter, sharded like the parameter.
            what: A name for the tensors, for messages.
        """
        return list(tensors)

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this process's shard of each full tensor, one tensor for each parameter, as a view. No collective."""
        return list(tensors)


def whole_pieces(parameters: Sequence[Tensor]) -> Pieces:
    """Return the `Pieces` of parameters that are not sharded."""
    return Pieces(parameters, [parameter.grad for parameter in parameters], [(0, 0)] * len(parameters))


class Removable(Protocol):
    """The handle of a registered hook."""

    def remove(self) -> None:
        """Remove the hook. Calling this again does nothing."""


class Engine:
    """Shards or synchronizes adapters over processes. Derive from it; the defaults are for a single process.

    A method's hooks see full parameters and gradients, even if the engine shards them between steps. All processes make
    the same calls in the same order.

    Attributes:
        name: The engine's name in messages.
        is_shared: Whether the processes train one adapter together, so that one process writes for all. Such an engine
            should reject optimizers whose steps depend on the loss, since each process has another loss.
        is_writer: Whether this process writes files. The other processes wait until the files exist.
        withholds: Whether the optimizer's step skips parameters without a gradient.
        splits: Whether adapters are sharded, so that all processes must take part in reading one.
        gives_pieces: Whether a method with ``Method.pieces`` gets shards and not gathered parameters.
        fixed_shapes: The reason why parameters cannot be resized, equal in all processes; None if they can be resized.
    """

    is_shared = False
    withholds = True
    gives_pieces = False

    @property
    def name(self) -> str:
        return "one process"

    @property
    def fixed_shapes(self) -> str | None:
        return _FIXED if distributed.is_available() and distributed.is_initialized() else None

    @property
    def splits(self) -> bool:
        return False

    @property
    def is_writer(self) -> bool:
        return True

    # Any: tunerkit.plugin.Tuner, whose module imports this one.
    def begin_(self, adapters: Sequence[Any], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Compare the adapters of all processes, make their values equal, and register hooks that keep them equal.

        Raises `StepError` in every process if the adapters differ. Nothing is changed then.

        Args:
            adapters: The tuners of the adapters, with the length of this training in ``total_steps``.
            optimizer: The optimizer of the adapters; None if it does not support hooks.

        Returns:
            The handles of the registered hooks, by adapter name.
        """
        return {}

    def before_step_(self, optimizer: Optimizer) -> None:
        """Check before each optimizer step that the processes are at the same step; raise `StepError` otherwise."""

    def no_sync(self) -> AbstractContextManager[object]:
        """Inside the block, backwards accumulate this process's gradients and do not average them over processes."""
        return nullcontext()

    def whole(
        self, slots: Sequence[nn.Module], *, gradients: bool
    ) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Inside the block, the parameters of ``slots`` are gathered, in the same modules and under the same names.

        Changes to parameters and gradients inside the block are kept.

        Args:
            slots: The adapter's modules.
            gradients: Whether to gather gradients too, which costs a second exchange.

        Returns:
            A context manager. It yields a function that maps a gathered parameter to the original that it replaces.
        """
        return nullcontext(same)

    def reshard_(self) -> None:
        """Shard adapters again that a forward has left gathered, since `pieces` needs shards. No collective."""

    def pieces(self, parameters: Sequence[nn.Parameter]) -> Pieces:
        """Return this process's shards of parameters; inside `whole`, the full parameters. No collective."""
        return whole_pieces(parameters)

    def resized_(self) -> None:
        """React to resized parameters. Called in all processes, with equal shapes, between two backwards."""

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Broadcast the values of tensors from process 0 to all processes.

        Args:
            tensors: Tensors of the same shapes in all processes.
            what: A name for the tensors, for messages.
        """

    def write_once(self, place: Path, content: str, write: Callable[[], Path]) -> Path:
        """Write a file in one process, and return in every process once the file exists.

        Args:
            place: The file's path in this process.
            content: A key of the content, equal in all processes if they write the same.
            write: Writes the file, and returns its path. It is called only in the process where `is_writer` is True.
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


def same(parameter: Tensor) -> Tensor:
    """Return ``parameter`` unchanged: the function that `Engine.whole` yields if nothing is sharded."""
    return parameter
