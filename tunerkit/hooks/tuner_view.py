"""What a hook may use of a tuner: the hooks know no more of it, so that they need nothing from layer injection."""

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from tunerkit.config import AdapterConfig
from tunerkit.layers import Adapter
from tunerkit.records import Target


class TunerView(Protocol):
    """The handle on one adapter of a wrapped model, as `tunerkit.Tuner` is one.

    ``state`` belongs to the method: `tunerkit_start` returns it, and only `tunerkit_restore` may replace it.
    """

    state: object | None

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
        """The places that have an adapter of the method, in the model's order."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken since `attach`."""

    @property
    def total_steps(self) -> int | None:
        """The length of training in optimizer steps, if it is known."""

    def adapters(self) -> dict[str, Adapter]:
        """The method's adapters by target path."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the adapter trains."""

    def ranks(self) -> dict[str, int]:
        """Live rank by target path."""
