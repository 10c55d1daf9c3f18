"""A function of one matrix, run for all matrices of a stack at once."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor

from tunerkit.errors import AdapterError
from tunerkit.plugin import BaseLayer


@attrs.frozen(eq=False)
class OneMatrix(BaseLayer):
    """One matrix of a stack, as a function under `torch.func.vmap` sees it.

    Attributes:
        whole: The stack.
        index: The number of the matrix, () int64, which vmap hides.
    """

    whole: BaseLayer
    index: Tensor

    @property
    def in_features(self) -> int:
        return self.whole.in_features

    @property
    def out_features(self) -> int:
        return self.whole.out_features

    @property
    def scale(self) -> float | Tensor:
        return self.whole.scale

    def bias(self) -> Tensor | None:
        found = self.whole.bias()
        return None if found is None else self._own(found)

    def dense(self) -> Tensor:
        """Read a copy of W: what a function writes into it does not reach the base."""
        return self._own(self.whole.dense())

    def pack(self, weight: Tensor) -> Tensor:
        return self.whole.pack(weight)

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> NoReturn:
        raise AdapterError("a method that is a function has no input; it returns what is added to the weight")

    def project_out(self, h: Tensor, p: Tensor) -> NoReturn:
        raise AdapterError("a method that is a function has no input; it returns what is added to the weight")

    def _own(self, values: Tensor) -> Tensor:
        # Not ``values[self.index]``, for which Python would ask vmap for a number.
        return values.index_select(0, self.index.unsqueeze(0)).squeeze(0)


def for_each_matrix(
    function: Callable[..., Any], base: BaseLayer, tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> Any:
    """Call ``function`` for each matrix of a stack.

    Args:
        function: Takes the arguments below by name, each for one matrix.
        base: The stack of E matrices.
        tensors: The parameters, each with E as its first size.
        given: What else the function takes: ``base`` itself, and ``weight`` (E, out, in).

    Returns:
        What the function returns, with E as the first size of each tensor.
    """
    weights = {key: value for key, value in given.items() if key != "base"}

    def one(tensors: dict[str, Tensor], weights: dict[str, Tensor], index: Tensor) -> Any:
        own = {"base": OneMatrix(base.module, base, index)} if "base" in given else {}
        return function(**tensors, **weights, **own)

    indices = torch.arange(base.stack, device=next(iter(tensors.values())).device)
    run = torch.func.vmap(one, randomness="different")
    if "base" in given:
        run = torch.compiler.disable(run)  # dynamo cannot trace how attrs builds a record
    return run(dict(tensors), weights, indices)
