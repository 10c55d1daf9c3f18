"""The base class of all base-layer kinds, and functions on a module's bias."""

import abc
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.layers import torch_private
from tunerkit.layers.weights import forward_name, forward_owner, is_listed, weight_of
from tunerkit.records import Packing, Rounding


@attrs.frozen(eq=False)
class BaseLayer(abc.ABC):
    """Abstract. A view of ``module`` as a matrix W: (out, in), independent of the module's own layout and arithmetic.

    Every kind obeys this law, for q (r, in) and p (out, r), with E first in W, q and p of a `stack` of E matrices::

        output with module.weight + pack(p @ q)  ==  output + project_out(project_in(x, q), p)

    A kind holds only the module and reads it at each call, because weights may be moved, resized or merged.

    Attributes:
        module: The model's own module.
        forwards: The qualified names of the classes whose forward the kind describes, or of packages, with a dot at
            their end. `matches` is called only for modules with such a forward; if empty, for all modules.
        weight_name: The name of the module's parameter that holds W.
        bias_name: The name of the module's parameter that holds the bias.
        linear: Whether the output is exactly x Wᵀ + b over the last dimension, so that the product can be fused.
        has_weight: Whether there is a W; False only for `OutputLayer`, which is for methods that adapt outputs.
        lends: Whether the module's own forward reads the whole weight, so that the input of W cannot be seen from
            outside. Core then overrides the weight for each call, and `project_in` and `project_out` raise
            `AdapterError`.
    """

    forwards: ClassVar[tuple[str, ...]] = ()
    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"
    has_weight: ClassVar[bool] = True
    lends: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    module: nn.Module

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether ``module`` computes what `BaseLayer` assumes: by default, if its forward is in `forwards`.

        Be strict: a subclass or an instance with its own ``forward`` may use its weight in another way. The adapter's
        output would then be silently wrong.
        """
        return is_listed(forward_name(module), cls.forwards)

    @property
    def in_features(self) -> int:
        """Number of columns of W. A kind overrides it to avoid calling `dense`."""
        return self.dense().shape[1]

    @property
    def out_features(self) -> int:
        """Number of rows of W. A kind overrides it to avoid calling `dense`."""
        return self.dense().shape[0]

    @property
    def stack(self) -> int:
        """E, the number of matrices in a stack; 0, the default, if W is one matrix."""
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W: (out, in), or (E, out, in) for a stack."""
        return (*((self.stack,) if self.stack else ()), self.out_features, self.in_features)

    @property
    def holder(self) -> nn.Module:
        """The module that has W as its parameter; by default `module` itself."""
        return self.module

    @property
    def scale(self) -> float | Tensor:
        """The factor by which the layer multiplies W's output, 1 by default; `project_out` includes it."""
        return 1.0

    @property
    def packing(self) -> Packing | None:
        """How a quantizer stores W; None, the default, if W is a plain tensor.

        Files describe a packed W by its shape alone, so that an adapter also fits the base in another precision. Kinds
        with a packing derive from ``tunerkit_quant.PackedLinear``.
        """
        return None

    def obstacle(self) -> str | None:
        """Return why the module cannot be adapted now, as the end of a sentence about its path; None if it can.

        Gradients also pass through packed modules that are not targets, so an obstacle of any packed module prevents
        training.
        """
        return None

    @abc.abstractmethod
    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Compute h = Q x, reading ``x`` as the layer itself does.

        Args:
            x: The layer's input; for an embedding the ids.
            q: Q, (r, in).
            dropout: The share of the input to drop. The caller passes 0 outside training.

        Returns:
            h in the layout of the layer's output, with r in place of out (r times the groups, for a convolution).
        """

    @abc.abstractmethod
    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """Compute the contribution of P h to the layer's output.

        Args:
            h: The result of `project_in`.
            p: P, (out, r).

        Returns:
            P h times `scale`, in the layout of the layer's output.
        """

    def shape_bias(self, b: Tensor) -> Tensor:
        """Reshape a bias (out,) to broadcast over the output; unchanged by default, for features in the last dim."""
        return b

    def bias(self) -> Tensor | None:
        """Read the module's own bias, which its output includes.

        Returns:
            By default the parameter ``bias_name``, (out,), detached; None if the module has no bias. An offloaded bias
            is loaded first.
        """
        found: Tensor | None = torch_private.own_parameters(self.module).get(self.bias_name)
        if found is not None and (found.is_meta or not found.numel()):
            found = weight_of(self.module, self.bias_name)
        return None if found is None else found.detach()

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Read W.

        Returns:
            W, (out, in), detached and in the weight's dtype. It may be a view of the weight, so never write to it. An
            offloaded weight is loaded first.
        """

    @abc.abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """Convert a matrix (out, in) to the layout of the module's own weight, in the dtype of the argument."""

    def merged(self, delta: Tensor) -> dict[str, Any]:
        """Compute the module's tensors with ΔW added to W. A kind overrides it to pack the merged weight.

        Args:
            delta: ΔW of all adapters together, (out, in), in fp32 or a wider dtype. It may require gradients.

        Returns:
            New tensors by their local name in the module, in the shape and dtype of the module's own. By default W
            alone: the sum is computed in fp32 or wider, and rounded once. With a `packing`, new objects for all
            attributes that store W; they replace the module's own while adapters are merged.

        Raises:
            AdapterError: There is a `packing`, and the kind cannot write a weight.
        """
        if self.packing is not None:
            raise AdapterError(
                f"the {type(self.module).__name__} stores its weight as {self.packing.name}, and {type(self).__name__} "
                "cannot write it: its plugin must define merged, put_ and rounded there, or in a base class of it"
            )
        own, packed = self.tensor(self.weight_name), self.pack(delta)
        wide = torch.promote_types(packed.dtype, torch.promote_types(own.dtype, torch.float32))
        return {self.weight_name: (own.to(wide) + packed.to(wide)).to(own.dtype)}

    def put_(self, stored: Mapping[str, Any]) -> None:
        """Replace attributes of the module by the values from `merged`, or by the original values.

        Only kinds with a `packing` define this method and the two below.
        """
        raise NotImplementedError

    def rounded(self, before: Tensor, delta: Tensor, others: Iterable[Rounding]) -> Rounding:
        """Measure the rounding error of the stored W + ΔW, after `put_`.

        Args:
            before: W before the merge, (out, in), in fp32.
            delta: ΔW, (out, in), in fp32.
            others: The rounding errors of earlier layers in the same merge.
        """
        raise NotImplementedError

    def unpacked(self, weight: Tensor) -> nn.Module:
        """Build a dense module of torch, such as ``nn.Linear``, by which `tunerkit.unwrap` replaces this module.

        Args:
            weight: W, (out, in), in the dtype of the new module. The bias is the module's own.
        """
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer of the module by its local name, even while core overrides it for a call.

        Raises:
            AdapterError: The module has no tensor with that name.
        """
        found: Tensor | None = torch_private.own_parameters(self.holder).get(name)
        found = dict(self.holder.named_buffers(recurse=False)).get(name) if found is None else found
        if found is None:
            raise AdapterError(f"a {type(self.module).__name__} has no parameter or buffer named {name!r}")
        return found

    def matrix(self) -> Tensor:
        """Read W, (out, in), with gradients. Only `linear` kinds define it."""
        raise NotImplementedError(f"{type(self).__name__} has linear = True and no matrix: define matrix()")

    def normalised(self, x: Tensor) -> Tensor:
        """For norm layers only: return ``x`` normalized, without weight and bias, in the shape and dtype of ``x``."""
        raise NotImplementedError(f"a {type(self.module).__name__} is not a norm")


# --- Biases: of norms too, which have no base-layer kind --------------------------------------------------------------


def bias_name(base: BaseLayer | None) -> str:
    """Return the local name of a module's bias."""
    return "bias" if base is None else base.bias_name


def has_trainable_bias(module: nn.Module, base: BaseLayer | None) -> bool:
    """Whether ``module`` has a bias that can be trained: `view_bias` can broadcast it over the output."""
    # As strict as base-layer kinds: a norm with its own forward may have its channels in any dimension.
    known = base is not None or forward_owner(module) in (nn.LayerNorm, *torch_private.channel_norms())
    return known and torch_private.own_parameters(module).get(bias_name(base)) is not None


def view_bias(module: nn.Module, base: BaseLayer | None, bias: Tensor, y: Tensor) -> Tensor:
    """Reshape ``bias`` (out,) to broadcast over the output ``y`` like the module's own bias."""
    if base is not None and base.has_weight:
        return base.shape_bias(bias)
    if isinstance(module, nn.LayerNorm):  # the only norm here that adds its bias along the last dimensions
        return bias
    return bias.view(-1, *[1] * (y.dim() - 1 - torch_private.is_batched(module, y)))
