"""What publishing needs of a running engine, and the error for all that can go wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import attrs

from tunerkit.errors import TunerkitError
from tunerkit_serving.findings import Engine


class PublishError(TunerkitError):
    """An adapter cannot be published to a running engine. The versions that were published before are unchanged."""


@attrs.frozen
class Listing:
    """What a server answers for.

    Attributes:
        base: The name of the base model in requests.
        adapters: The names of the adapters that are loaded.
    """

    base: str
    adapters: frozenset[str]


class Server(Protocol):
    """A running engine that loads adapters. Each method raises `PublishError`."""

    @property
    def rules(self) -> Engine:
        """What such an engine refuses or scales wrongly."""
        ...

    def listed(self) -> Listing:
        """Ask for the models and the adapters."""
        ...

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter in an absolute folder, which must be the same for the server. A loaded name is no error."""
        ...

    def unload(self, name: str) -> None:
        """Unload an adapter. A name that is not loaded is no error."""
        ...

    def logprobs(self, model: str, tokens: Sequence[int]) -> Sequence[float]:
        """Return log-probabilities after a short prompt of token ids, by the base model or by an adapter."""
        ...
