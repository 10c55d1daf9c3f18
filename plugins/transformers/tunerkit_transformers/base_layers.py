"""The kinds of layers that transformers defines itself: ``Conv1D``, Falcon's linear layer, and scaled embeddings."""

from typing import Any, ClassVar, cast, final

import attrs
from torch import Tensor, nn

from tunerkit.plugin import BaseLayer, forward_name
from tunerkit.plugin.trainers import DenseLinear, EmbeddingLayer


@final
@attrs.frozen(eq=False)
class Conv1DLayer(DenseLinear):
    """``Conv1D`` (GPT-2): a linear layer whose weight is stored as (in, out)."""

    forwards: ClassVar[tuple[str, ...]] = ("transformers.pytorch_utils.Conv1D",)

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) to (in, out), a view."""
        return weight.t()

    def matrix(self) -> Tensor:
        """Return the weight transposed, a view."""
        return super().matrix().t()


@final
@attrs.frozen(eq=False)
class FalconLinearLayer(DenseLinear):
    """Falcon's linear layer, whose forward writes out x Wᵀ + b."""

    forwards: ClassVar[tuple[str, ...]] = ("transformers.models.falcon.modeling_falcon.FalconLinear",)

    module: nn.Linear

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.module.in_features

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return self.module.out_features


@final
@attrs.frozen(eq=False)
class ScaledEmbeddingLayer(BaseLayer):
    """An embedding that multiplies the rows it looks up (Gemma, BART).

    Attributes:
        unscaled: The same layer as an ``nn.Embedding``, before the multiplication by `scale`.
    """

    forwards: ClassVar[tuple[str, ...]] = ("transformers.",)

    module: nn.Embedding
    # Built once: `torch.compile` traces no class of attrs that is built in a forward.
    unscaled: EmbeddingLayer = attrs.field(init=False)

    @unscaled.default
    def _without_scale(self) -> EmbeddingLayer:
        return EmbeddingLayer(self.module)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether this is one of the twenty-odd classes whose forward is ``super().forward(ids) * self.embed_scale``.

        An additional parameter means that the forward inserts an additional row (T5Gemma2's end-of-image token); such a
        module cannot be adapted.
        """
        match module:
            case nn.Embedding(embed_scale=float() | int() | Tensor()):
                named = super().matches(module) and forward_name(module).endswith("ScaledWordEmbedding")
                return named and [own for own, _ in module.named_parameters(recurse=False)] == ["weight"]
        return False

    @property
    def scale(self) -> float | Tensor:
        """``embed_scale`` as the layer's forward uses it."""
        scale: Any = self.module.embed_scale
        # Gemma's is a tensor, rounded to the weight's dtype before it multiplies; BART's is a number.
        return scale.to(self.module.weight.dtype) if isinstance(scale, Tensor) else cast(float, scale)

    @property
    def in_features(self) -> int:
        """Number of ids."""
        return self.unscaled.in_features

    @property
    def out_features(self) -> int:
        """Width of a row."""
        return self.unscaled.out_features

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Ids (...) to (..., r), as an ``nn.Embedding`` does."""
        return self.unscaled.project_in(x, q, dropout)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(..., r) to (..., out), multiplied by `scale`."""
        return self.unscaled.project_out(h, p) * self.scale

    def dense(self) -> Tensor:
        """Return the weight transposed, a view, without the scale."""
        return self.unscaled.dense()

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) to (in, out), with the row of ``padding_idx`` zeroed."""
        return self.unscaled.pack(weight)
