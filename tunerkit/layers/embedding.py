"""Embeddings as base layers."""

from typing import cast, final

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.layers.base import BaseLayer, runs_forward_of
from tunerkit.libraries import forward_owner, is_scaled_embedding, weight_of, whole_shape


@final
@attrs.frozen(eq=False)
class EmbeddingLayer(BaseLayer):
    """``nn.Embedding``, and transformers' embeddings that multiply the rows they look up (Gemma, BART).

    The input is a one-hot row, so in = num_embeddings and W is the weight transposed. At ``padding_idx`` the delta is
    exactly 0 and has no gradient, like the layer's own weight: `project_in` drops that column of Q, and `pack` zeroes
    that row.
    """

    module: nn.Embedding

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is ``nn.Embedding``'s, or that times ``embed_scale``."""
        return runs_forward_of(module, nn.Embedding) or is_scaled_embedding(module)

    @property
    def scale(self) -> float | Tensor:
        """``embed_scale`` as the layer's forward uses it; 1 for ``nn.Embedding``."""
        if forward_owner(self.module) is nn.Embedding:
            return 1.0
        scale = self.module.embed_scale
        # Gemma's is a tensor, rounded to the weight's dtype before it multiplies; BART's is a number.
        return scale.to(self.module.weight.dtype) if isinstance(scale, Tensor) else cast(float, scale)

    @property
    def in_features(self) -> int:
        """Number of ids."""
        return whole_shape(self.module.weight)[0]

    @property
    def out_features(self) -> int:
        """Width of a row."""
        return whole_shape(self.module.weight)[1]

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Ids (...) to (..., r). ``dropout`` drops whole ids, just as it would drop elements of one-hot rows."""
        h = F.embedding(x, q.t())
        if dropout > 0:
            h = h * F.dropout(h.new_ones((*x.shape, 1)), dropout)
        if self.module.padding_idx is None:
            return h
        return h.masked_fill((x == self.module.padding_idx).unsqueeze(-1), 0)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(..., r) to (..., out), multiplied by `scale`."""
        delta = F.linear(h, p)
        return delta if forward_owner(self.module) is nn.Embedding else delta * self.scale

    def example_input(self) -> Tensor:
        """The first ids, at most 64, and the padding id: its row is the only one that a delta never changes."""
        ids = list(range(min(64, self.module.num_embeddings)))
        padding = [] if self.module.padding_idx is None else [self.module.padding_idx]
        return torch.tensor([*ids, *padding], device=weight_of(self.module).device)

    def dense(self) -> Tensor:
        """Return the weight transposed, a view: without the scale, and with the row of ``padding_idx`` unchanged."""
        return weight_of(self.module).detach().t()

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) to (in, out), with the row of ``padding_idx`` zeroed: a delta never touches it."""
        if self.module.padding_idx is None:
            return weight.t()
        packed = weight.t().clone()
        packed[self.module.padding_idx] = 0
        return packed
