"""Linear layers whose weight a quantiser stores packed: the part that all their kinds share."""

import abc
from typing import Any, ClassVar, cast

import attrs
import torch.nn.functional as F
from torch import Tensor

from tunerkit.layers.base import BaseLayer, drop
from tunerkit.records import Packing


@attrs.frozen(eq=False)
class PackedLinear(BaseLayer):
    """Abstract. A linear layer, x Wᵀ + b, with a `packing`. A kind defines `matches`, `packing` and `dense`.

    It defines `requantised` too if adapters can be merged into the layer. The module says how many ``in_features`` and
    ``out_features`` it has.
    """

    linear: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def packing(self) -> Packing:
        """How the quantiser stores W."""

    @property
    def in_features(self) -> int:
        """Features of the input, as the module says."""
        return cast(Any, self.module).in_features  # type: ignore[no-any-return]

    @property
    def out_features(self) -> int:
        """Features of the output, as the module says."""
        return cast(Any, self.module).out_features  # type: ignore[no-any-return]

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """(..., in) to (..., r)."""
        return F.linear(drop(x, dropout), q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(..., r) to (..., out)."""
        return F.linear(h, p)

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in), unchanged: it is `requantised` that packs."""
        return weight

    def matrix(self) -> Tensor:
        """Return `dense`: a packed weight is frozen, so it has no gradients."""
        return self.dense()
