"""The base-layer kinds of torch's own layers and of modules without a known weight, and the search for a kind."""

import math
from collections.abc import Callable, Iterable
from typing import ClassVar, NoReturn, cast, final

import attrs
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tunerkit.errors import AdapterError
from tunerkit.layers import torch_private
from tunerkit.layers.base_layer import BaseLayer
from tunerkit.layers.torch_private import is_packed
from tunerkit.layers.weights import forward_name, forward_owner, is_listed, weight_of, whole_shape
from tunerkit.records import DefaultTargets, ModelLibrary, WeightReader


@attrs.frozen(eq=False)
class DenseLinear(BaseLayer):
    """Abstract. A linear layer, x Wᵀ + b, whose W is a plain tensor. A subclass defines `matches`.

    If the module stores W in another layout, the subclass also defines `matrix` and `pack`.
    """

    linear: ClassVar[bool] = True

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Compute Q x: (..., in) to (..., r)."""
        return F.linear(drop(x, dropout), q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """Compute P h: (..., r) to (..., out)."""
        return F.linear(h, p)

    def dense(self) -> Tensor:
        return self.matrix().detach()

    def pack(self, weight: Tensor) -> Tensor:
        """Return the matrix (out, in) unchanged, since the module's weight has this layout."""
        return weight

    def matrix(self) -> Tensor:
        return weight_of(self.module)


@final
@attrs.frozen(eq=False)
class LinearLayer(DenseLinear):
    """The base-layer kind of ``nn.Linear``, and of subclasses that keep its forward."""

    forwards: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear",)

    module: nn.Linear

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return super().matches(module) and _has_numbers(module)

    @property
    def in_features(self) -> int:
        return self.module.in_features

    @property
    def out_features(self) -> int:
        return self.module.out_features


@final
@attrs.frozen(eq=False)
class ConvLayer(BaseLayer):
    """The kind of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, with any groups, stride, dilation and padding.

    W is the weight (C_out, C_in/groups, *kernel), flattened after its first dimension, so in = C_in/groups · the number
    of kernel positions. Q is a convolution to r channels per group, with the layer's stride, dilation and padding mode.
    P is a 1×1 convolution of the output of Q.
    """

    forwards: ClassVar[tuple[str, ...]] = tuple(f"torch.nn.modules.conv.Conv{n}d" for n in (1, 2, 3))

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module's ``forward`` and ``_conv_forward`` are torch's own."""
        numbers = super().matches(module) and _has_numbers(module)
        return numbers and torch_private.runs_convolution_of(module, forward_owner(module))

    @property
    def in_features(self) -> int:
        return self.module.in_channels // self.module.groups * math.prod(self.module.kernel_size)

    @property
    def out_features(self) -> int:
        return self.module.out_channels

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Convolve x with Q: (N, C_in, *size) to (N, groups · r, *size out); N may be missing."""
        kernel = self.pack(q)  # (r, C_in/groups, *kernel)
        if self.module.groups > 1:
            # Each group applies the same Q to its own channels, just as p @ q has the same Q in each group's rows.
            kernel = kernel.repeat(self.module.groups, *[1] * (kernel.ndim - 1))
        return torch_private.convolve(self.module, drop(x, dropout), kernel)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """Convolve h with P, 1×1: (N, groups · r, *size out) to (N, C_out, *size out); N may be missing."""
        dimensions = len(self.module.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
        return convolve(h, p.reshape(*p.shape, *[1] * dimensions), groups=self.module.groups)

    def shape_bias(self, b: Tensor) -> Tensor:
        """Reshape a bias (out,) to (out, 1, ...), which broadcasts over batched and unbatched outputs."""
        return b.reshape(-1, *[1] * len(self.module.kernel_size))

    def dense(self) -> Tensor:
        return weight_of(self.module).detach().flatten(1)

    def pack(self, weight: Tensor) -> Tensor:
        """Reshape a matrix (out, in) like the module's weight, (C_out, C_in/groups, *kernel)."""
        return weight.reshape(weight.shape[0], -1, *self.module.kernel_size)


@final
@attrs.frozen(eq=False)
class EmbeddingLayer(BaseLayer):
    """The base-layer kind of ``nn.Embedding``, and of subclasses that keep its forward.

    The input is a one-hot row, so in = num_embeddings and W is the weight transposed. At ``padding_idx`` the delta is
    exactly 0 and has no gradient, like the layer's own weight: `project_in` drops that column of Q, and `pack` zeroes
    that row.
    """

    forwards: ClassVar[tuple[str, ...]] = ("torch.nn.modules.sparse.Embedding",)

    module: nn.Embedding

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return super().matches(module) and _has_numbers(module)

    @property
    def in_features(self) -> int:
        return whole_shape(self.module.weight)[0]

    @property
    def out_features(self) -> int:
        return whole_shape(self.module.weight)[1]

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Look up columns of Q: ids (...) to (..., r). ``dropout`` drops whole ids, like dropout on one-hot rows."""
        h = F.embedding(x, q.t())
        if dropout > 0:
            h = h * F.dropout(h.new_ones((*x.shape, 1)), dropout)
        if self.module.padding_idx is None:
            return h
        return h.masked_fill((x == self.module.padding_idx).unsqueeze(-1), 0)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """Compute P h: (..., r) to (..., out)."""
        return F.linear(h, p)

    def dense(self) -> Tensor:
        return weight_of(self.module).detach().t()  # with the row of padding_idx unchanged

    def pack(self, weight: Tensor) -> Tensor:
        """Transpose a matrix (out, in) to (in, out), and zero the row of ``padding_idx``, which no delta changes."""
        if self.module.padding_idx is None:
            return weight.t()
        packed = weight.t().clone()
        packed[self.module.padding_idx] = 0
        return packed


@final
@attrs.frozen(eq=False)
class AttentionLayer(BaseLayer):
    """The kind of ``nn.MultiheadAttention`` with one width E of q, k and v: W is ``in_proj_weight``, (3·E, E).

    The output projection, ``out_proj``, is a linear layer of its own. With ``kdim`` or ``vdim`` there are three weights
    instead of one; this kind does not match such modules.
    """

    forwards: ClassVar[tuple[str, ...]] = ("torch.nn.modules.activation.MultiheadAttention",)
    weight_name: ClassVar[str] = "in_proj_weight"
    bias_name: ClassVar[str] = "in_proj_bias"
    lends: ClassVar[bool] = True

    module: nn.MultiheadAttention

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        packed = isinstance(torch_private.own_parameters(module).get(cls.weight_name), nn.Parameter)
        return packed and super().matches(module)

    @property
    def in_features(self) -> int:
        return whole_shape(self.module.in_proj_weight)[1]  # E

    @property
    def out_features(self) -> int:
        return whole_shape(self.module.in_proj_weight)[0]  # 3·E

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> NoReturn:
        """Raise `AdapterError`: the projections are computed inside forward, so nothing can be added to them."""
        raise AdapterError(
            "an adapter's forward() cannot add to the projections that nn.MultiheadAttention computes in its own "
            "forward(); implement tunerkit_delta for this method, or exclude the module"
        )

    def project_out(self, h: Tensor, p: Tensor) -> NoReturn:
        self.project_in(h, p)

    def dense(self) -> Tensor:
        return weight_of(self.module, self.weight_name).detach()

    def pack(self, weight: Tensor) -> Tensor:
        """Return the matrix (3·E, E) unchanged, since the module's weight has this layout."""
        return weight


@final
@attrs.frozen(eq=False)
class OutputLayer(BaseLayer):
    """A module whose weight is unknown, since no other kind matches; only methods that adapt outputs can use it."""

    has_weight: ClassVar[bool] = False

    def dense(self) -> NoReturn:
        """Raise `AdapterError`, since the weight is unknown. The other methods that need a weight call this."""
        raise AdapterError(
            f"the base layer is a {type(self.module).__name__}, whose weight tunerkit does not know, so it has "
            "no in_features, project_in and the like; read the sizes from target.module in tunerkit_build_adapter"
        )

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> NoReturn:
        self.dense()

    def project_out(self, h: Tensor, p: Tensor) -> NoReturn:
        self.dense()

    def pack(self, weight: Tensor) -> NoReturn:
        self.dense()


def drop(x: Tensor, dropout: float) -> Tensor:
    """Apply dropout to ``x``; return ``x`` itself for a dropout of 0."""
    return F.dropout(x, dropout) if dropout > 0 else x


def _has_numbers(module: nn.Module) -> bool:
    """Whether the module's weight is an ordinary tensor: not lazy and not packed."""
    weight = cast(Tensor, module.weight)
    return not is_lazy(weight) and not is_packed(weight)


# --- Knowledge of all layers and models -------------------------------------------------------------------------------


def _raise(kind: type[BaseLayer], error: BaseException) -> NoReturn:
    raise error


@attrs.frozen(eq=False)
class Knowledge:
    """The records about layers and models. If two records describe the same class or architecture, the first counts."""

    kinds: tuple[type[BaseLayer], ...]
    weight_readers: tuple[WeightReader, ...]
    default_targets: tuple[DefaultTargets, ...]
    # Called with a kind whose `matches` raised, and with the exception. If it returns, the kind is not used again.
    leave_out: Callable[[type[BaseLayer], BaseException], None] = _raise
    libraries: tuple[ModelLibrary, ...] = ()
    # Returns how to install the plugin for the library of an object; "" if it is installed.
    unserved: Callable[[object], str] = lambda thing: ""
    _asked: dict[str, frozenset[type[BaseLayer]]] = attrs.field(init=False, factory=dict, repr=False)

    def asked(self, forward: str) -> frozenset[type[BaseLayer]]:
        """Return the base-layer kinds that may match a module whose forward has this qualified name; cached."""
        if forward not in self._asked:
            kinds = (kind for kind in self.kinds if not kind.forwards or is_listed(forward, kind.forwards))
            self._asked[forward] = frozenset(kinds)
        return self._asked[forward]


KINDS: tuple[type[BaseLayer], ...] = (LinearLayer, ConvLayer, EmbeddingLayer, AttentionLayer)
# torch's own attention uses the weight of its output projection without calling it.
_READERS = (WeightReader("torch.nn.modules.activation.MultiheadAttention", ("out_proj",)),)
CORE = Knowledge(KINDS, _READERS, ())


def as_base_layers(modules: Iterable[nn.Module], knowledge: Knowledge) -> dict[nn.Module, BaseLayer]:
    """Return the base layer of each module that matches a kind, by module; the first matching kind is used.

    A kind whose `matches` raises for one module is used for none, so that equal modules do not get different kinds.
    """
    found: dict[nn.Module, BaseLayer] = {}
    waiting = {module: knowledge.asked(forward_name(module)) for module in modules}
    wanted = set[type[BaseLayer]]().union(*waiting.values())
    for kind in knowledge.kinds:
        if kind not in wanted:
            continue
        asked = [each for each, kinds in waiting.items() if kind in kinds]
        try:
            matched = {module: kind(module) for module in asked if kind.matches(module)}
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            knowledge.leave_out(kind, error)
        else:
            found |= matched
            waiting = {module: kinds for module, kinds in waiting.items() if module not in matched}
    return found


def as_base_layer(module: nn.Module, kinds: tuple[type[BaseLayer], ...] = KINDS) -> BaseLayer | None:
    """Return a module as a base layer of the first of ``kinds`` that matches, or None."""
    return next((kind(module) for kind in kinds if kind.matches(module)), None)
