"""The part of a tuner that hooks may use. With this Protocol, the hooks do not depend on layer injection."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from tunerkit.config import AdapterConfig
from tunerkit.hooks.engines import Engine, Pieces
from tunerkit.layers import Adapter
from tunerkit.records import Target


class TunerView(Protocol):
    """The handle on one adapter of a wrapped model. `tunerkit.Tuner` implements it.

    ``state`` belongs to the method: `tunerkit_start` returns it, and only `tunerkit_restore` may replace it. If one
    process trains the adapter, ``engine`` is None.
    """

    state: object | None
    engine: Engine | None

    @property
    def name(self) -> str:
        """The adapter's name."""

    @property
    def method(self) -> str:
        """The method's name."""

    @property
    def config(self) -> AdapterConfig:
        """The method's settings."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets with an adapter of the method, in the model's order."""

    @property
    def steps(self) -> int:
        """The number of optimizer steps since `attach`."""

    @property
    def total_steps(self) -> int | None:
        """The length of training in optimizer steps, if it is known."""

    def adapters(self) -> dict[str, Adapter]:
        """The method's adapters by target path."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's parameters: the method's own, also those it keeps fixed, and trained copies and biases."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters with their names in the adapter's file."""

    def whole(self, *, gradients: bool = False) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Inside the block, the adapter is whole in this process. All processes must enter it."""

    def pieces(self, parameters: Sequence[nn.Parameter]) -> Pieces:
        """What this process holds of the adapter's parameters, for a method that works on pieces."""

    def agree_(self, tensors: Sequence[Tensor], what: str) -> None:
        """Overwrite tensors with those of process 0, so that all processes of a training decide alike."""

    def ranks(self) -> dict[str, int]:
        """The live rank by target path."""
