"""The kinds of base layers: how each reads its input, is added to, and shows its weight as one (out, in) matrix."""

import abc
import math
from typing import ClassVar, cast, final

import attrs
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tunerkit.offloading import forward_owner


@attrs.frozen(eq=False)
class BaseLayer(abc.ABC):
    """Abstract. A view of ``module`` as a matrix W: (out, in), whatever its own layout and arithmetic.

    The law that every kind keeps, for q (r, in) and p (out, r)::

        output with module.weight + pack(p @ q)  ==  output + project_out(project_in(x, q), p)

    A kind holds the module and nothing else, and reads it anew at each call: weights may be moved, resized, merged.
    ``weight_name`` and ``bias_name`` say which of the module's parameters hold W and the bias. A kind is ``linear`` if
    the output is exactly x Wᵀ + b over the last dimension, so that the product can be fused. A kind that ``lends`` is
    read whole by the module's own forward: no input of W can be seen from outside, so the delta is lent to the weight
    (`tunerkit.lending`), and `project_in` and `project_out` raise `AdapterError`.
    """

    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"
    lends: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    module: nn.Module

    @classmethod
    @abc.abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether this kind says the truth about ``module``.

        Be strict: a subclass or an instance with its own ``forward`` may do anything with its weight, and an adapter
        beside it would be wrong without an error.
        """

    @property
    @abc.abstractmethod
    def in_features(self) -> int:
        """Columns of W."""

    @property
    @abc.abstractmethod
    def out_features(self) -> int:
        """Rows of W."""

    @property
    @abc.abstractmethod
    def scale(self) -> float | Tensor:
        """What the layer multiplies W's output with; 1.0 nearly everywhere. `project_out` has it in already."""

    @abc.abstractmethod
    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Return h = Q x, reading ``x`` as the layer itself does.

        ``x`` is the layer's input (for an embedding the ids), ``q`` (r, in). ``dropout`` is the share of the input
        that is dropped; the caller passes 0 outside training. ``h`` has the layout of the layer's output with r in
        place of out (times the groups, for a convolution).
        """

    @abc.abstractmethod
    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """Return what P h adds to the layer's output, in its layout: ``h`` from `project_in`, ``p`` (out, r)."""

    @abc.abstractmethod
    def shape_bias(self, b: Tensor) -> Tensor:
        """Return ``b`` (out,) shaped to broadcast over the layer's output."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return W (out, in), detached and in the weight's dtype: a view where there can be one, so only read it."""

    @abc.abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """Return ``weight`` (out, in), in its own dtype, in the layout of the module's own weight."""

    def matrix(self) -> Tensor:
        """Return W (out, in) itself, not detached. Only a `linear` kind is asked."""
        raise NotImplementedError(f"{type(self).__name__} says that it is linear: define matrix()")


@final
@attrs.frozen(eq=False)
class LinearLayer(BaseLayer):
    """``nn.Linear``, and subclasses that keep its forward; Falcon's too, which writes the same out as x Wᵀ + b."""

    linear: ClassVar[bool] = True

    module: nn.Linear

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is exactly ``nn.Linear``'s or Falcon's."""
        return _runs_forward_of(module, nn.Linear) or _is_transformers(module, "models.falcon", "FalconLinear")

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.module.in_features

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return self.module.out_features

    @property
    def scale(self) -> float:
        """Always 1."""
        return 1.0

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """(..., in) to (..., r)."""
        return F.linear(_drop(x, dropout), q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(..., r) to (..., out)."""
        return F.linear(h, p)

    def shape_bias(self, b: Tensor) -> Tensor:
        """(out,) as it is."""
        return b

    def dense(self) -> Tensor:
        """Return the weight itself."""
        return self.module.weight.detach()

    def pack(self, weight: Tensor) -> Tensor:
        """Return (out, in) as it is."""
        return weight

    def matrix(self) -> Tensor:
        """Return the weight itself."""
        return self.module.weight


@final
@attrs.frozen(eq=False)
class Conv1DLayer(BaseLayer):
    """transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored as (in, out)."""

    linear: ClassVar[bool] = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is that of transformers' class, told by name: core never imports transformers."""
        return _is_transformers(module, "pytorch_utils", "Conv1D")

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return _weight(self.module).shape[0]

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return _weight(self.module).shape[1]

    @property
    def scale(self) -> float:
        """Always 1."""
        return 1.0

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """(..., in) to (..., r)."""
        return F.linear(_drop(x, dropout), q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(..., r) to (..., out)."""
        return F.linear(h, p)

    def shape_bias(self, b: Tensor) -> Tensor:
        """(out,) as it is."""
        return b

    def dense(self) -> Tensor:
        """Return the weight transposed, a view."""
        return _weight(self.module).detach().t()

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) to (in, out), a view."""
        return weight.t()

    def matrix(self) -> Tensor:
        """Return the weight transposed, a view."""
        return _weight(self.module).t()


@final
@attrs.frozen(eq=False)
class ConvLayer(BaseLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with whatever groups, stride, dilation and padding.

    W is the weight (C_out, C_in/groups, *kernel) with all but its first dimension flattened, so in = C_in/groups ·
    positions of the kernel. Q is a convolution to r channels per group, which the layer runs itself in place of its
    own weight, so that stride, dilation and every padding mode are its own; P is a 1×1 convolution of what comes out.
    """

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether both methods that make up a convolution's forward are torch's own."""
        return any(
            _runs_forward_of(module, kind)
            and type(module)._conv_forward is kind._conv_forward  # type: ignore[attr-defined]
            and "_conv_forward" not in vars(module)
            for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        )

    @property
    def in_features(self) -> int:
        """Inputs that one position of one output channel sees: C_in/groups · positions of the kernel."""
        return self.module.in_channels // self.module.groups * math.prod(self.module.kernel_size)

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.module.out_channels

    @property
    def scale(self) -> float:
        """Always 1."""
        return 1.0

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """(N, C_in, *size) to (N, groups · r, *size out); N may be missing."""
        kernel = q.reshape(q.shape[0], -1, *self.module.kernel_size)  # (r, C_in/groups, *kernel)
        if self.module.groups > 1:
            # Every group reads its own channels through the same Q, as the rows of W in every group do.
            kernel = kernel.repeat(self.module.groups, *[1] * (kernel.ndim - 1))
        h: Tensor = self.module._conv_forward(_drop(x, dropout), kernel, None)
        return h

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(N, groups · r, *size out) to (N, C_out, *size out); N may be missing."""
        dimensions = len(self.module.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
        return convolve(h, p.reshape(*p.shape, *[1] * dimensions), groups=self.module.groups)

    def shape_bias(self, b: Tensor) -> Tensor:
        """(out,) to (out, 1, ...): right for batched and unbatched outputs."""
        return b.reshape(-1, *[1] * len(self.module.kernel_size))

    def dense(self) -> Tensor:
        """Return the weight flattened behind its first dimension, a view if it is contiguous."""
        return self.module.weight.detach().flatten(1)

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) to (C_out, C_in/groups, *kernel)."""
        return weight.reshape(weight.shape[0], -1, *self.module.kernel_size)


@final
@attrs.frozen(eq=False)
class EmbeddingLayer(BaseLayer):
    """``nn.Embedding`` and transformers' embeddings that multiply what they looked up (Gemma, BART).

    The input is a one-hot row, so in = num_embeddings and W is the weight transposed. At ``padding_idx`` the delta is
    exactly 0 and has no gradient, as the layer's own weight has none there: dropping that column of Q is part of
    `project_in`, and `pack` zeroes its row.
    """

    module: nn.Embedding

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is ``nn.Embedding``'s, or that times ``embed_scale``."""
        return _runs_forward_of(module, nn.Embedding) or _is_scaled_embedding(module)

    @property
    def in_features(self) -> int:
        """Rows of the table."""
        return self.module.num_embeddings

    @property
    def out_features(self) -> int:
        """Width of a row."""
        return self.module.embedding_dim

    @property
    def scale(self) -> float | Tensor:
        """``embed_scale`` as the layer's forward uses it, else 1."""
        if forward_owner(self.module) is nn.Embedding:
            return 1.0
        scale = self.module.embed_scale
        # Gemma's is a tensor, rounded to the weight's dtype before it multiplies; BART's is a number.
        return scale.to(self.module.weight.dtype) if isinstance(scale, Tensor) else cast(float, scale)

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Ids (...) to (..., r); ``dropout`` drops whole ids, as dropping elements of a one-hot row would."""
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

    def shape_bias(self, b: Tensor) -> Tensor:
        """(out,) as it is."""
        return b

    def dense(self) -> Tensor:
        """Return the weight transposed, a view; without the scale, and with the row of ``padding_idx`` as it is."""
        return self.module.weight.detach().t()

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) to (in, out), with the row of ``padding_idx`` zeroed: a delta never touches it."""
        if self.module.padding_idx is None:
            return weight.t()
        packed = weight.t().clone()
        packed[self.module.padding_idx] = 0
        return packed


def _drop(x: Tensor, dropout: float) -> Tensor:
    return F.dropout(x, dropout) if dropout > 0 else x


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _runs_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    # A lazy layer inherits its forward too, and doesn't know its features yet.
    return forward_owner(module) is kind and not is_lazy(_weight(module))


def _is_transformers(module: nn.Module, place: str, name: str) -> bool:
    owner = forward_owner(module)
    return owner.__name__ == name and f"{owner.__module__}.".startswith(f"transformers.{place}.")


def _is_scaled_embedding(module: nn.Module) -> bool:
    """Whether this is one of the twenty-odd classes in transformers that return ``super().forward(ids) * embed_scale``.

    A further parameter means a further row that the forward puts in (T5Gemma2's end-of-image token): not ours.
    """
    owner = forward_owner(module)
    return (
        isinstance(module, nn.Embedding)
        and owner.__name__.endswith("ScaledWordEmbedding")
        and owner.__module__.startswith("transformers.")
        and isinstance(getattr(module, "embed_scale", None), float | int | Tensor)
        and list(module._parameters) == ["weight"]
    )
