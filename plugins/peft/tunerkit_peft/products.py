"""What a PEFT adapter holds, as its method has it: the products in core's orientation, and its own tensors."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import attrs
from torch import Tensor, nn

from tunerkit.plugin import Factors


@attrs.frozen(eq=False)
class Read:
    """An adapter as its method holds it.

    Attributes:
        factors: The products by target path, computed when they are asked for.
        config: The method's settings.
        tensors: The tensors of the method's adapters, by target path.
        shared: The tensors that they share.
    """

    factors: Mapping[str, Factors]
    config: Mapping[str, object]
    tensors: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class Adapted:
    """What a file has at the targets, before it is compared with the model.

    Attributes:
        paths: The paths of the targets.
        takes: Whether PEFT adapts a module by this type.
        contradictions: What does not fit the modules, on any base.
        mismatches: What another base model would explain.
        read: Reads the tensors.
        remarks: What the settings say and the adapter will not hold.
        beside: Those of the paths that ``target_modules`` need not name: PEFT finds them in another way.
    """

    paths: Sequence[str]
    takes: Callable[[nn.Module], bool]
    contradictions: Sequence[str]
    mismatches: Sequence[str]
    read: Callable[[], Read]
    remarks: Sequence[str]
    beside: Collection[str] = ()


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
