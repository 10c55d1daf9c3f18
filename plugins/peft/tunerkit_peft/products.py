"""The products of a PEFT adapter in core's orientation, and its own tensors for the method that trains on."""

from collections.abc import Callable, Iterator, Mapping

import attrs
from torch import Tensor

from tunerkit.plugin import Factors


@attrs.frozen(eq=False)
class Read:
    """An adapter as its method holds it.

    Attributes:
        factors: The products by target path, computed when they are asked for.
        config: The method's settings.
        tensors: The tensors of the method's adapters, by target path.
    """

    factors: Mapping[str, Factors]
    config: Mapping[str, object]
    tensors: Mapping[str, Mapping[str, Tensor]]


class Lazy(Mapping[str, Factors]):
    """Products that are computed each time they are asked for: all at once would hold the adapter a second time."""

    def __init__(self, compute: Mapping[str, Callable[[], Factors]]) -> None:
        self._compute = compute

    def __getitem__(self, path: str) -> Factors:
        return self._compute[path]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._compute)

    def __len__(self) -> int:
        return len(self._compute)
