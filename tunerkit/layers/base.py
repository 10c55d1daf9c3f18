"""The base class of all kinds of base layers, and what a module and its kind say of a bias."""

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
    """Abstract. A view of ``module`` as a matrix W: (out, in), independent of its own layout and arithmetic.

    Every kind obeys this law, for q (r, in) and p (out, r)::

        output with module.weight + pack(p @ q)  ==  output + project_out(project_in(x, q), p)

    A kind holds only the module and reads it at each call, because weights may be moved, resized or merged.

    Attributes:
        module: The model's own module.
        forwards: The classes whose forward the kind describes, by qualified name, or packages, with a dot at their
            end. If there are some, `matches` is asked about no other module.
        weight_name: The name of the module's parameter that holds W.
        bias_name: The name of the module's parameter that holds the bias.
        linear: Whether the output is exactly x Wᵀ + b over the last dimension, so that the product can be fused.
        has_weight: Whether there is a W. Only the kind of methods that adapt outputs has none.
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
        """Check whether the law above holds for ``module``: by default, whether its forward is one of `forwards`.

        Be strict: a subclass or an instance with its own ``forward`` may do anything with its weight. An adapter
        would then be wrong without an error.
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
    def scale(self) -> float | Tensor:
        """The factor by which the layer multiplies W's output, 1 by default; `project_out` includes it."""
        return 1.0

    @property
    def packing(self) -> Packing | None:
        """How a quantiser stores W; None, the default, if W is stored as numbers that may be added to.

        Where there is a packing, files describe W by its shape alone, so that an adapter fits the base in another
        precision too. Kinds with a packing derive from ``tunerkit_quant.PackedLinear``.
        """
        return None

    def obstacle(self) -> str | None:
        """Say why the module cannot be adapted as it is now, as the end of a sentence about its path; None if it can.

        Gradients also pass through modules with a `packing` that are no targets, so an obstacle of any such module
        prevents training.
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
        """Compute what P h adds to the layer's output.

        Args:
            h: The result of `project_in`.
            p: P, (out, r).

        Returns:
            P h times `scale`, in the layout of the layer's output.
        """

    def shape_bias(self, b: Tensor) -> Tensor:
        """Shape a bias (out,) to broadcast over the output: as it is by default, for features in the last one."""
        return b

    def bias(self) -> Tensor | None:
        """Read the module's own bias, which its output includes.

        Returns:
            By default the parameter ``bias_name``, (out,), detached; None if the module has none. An offloaded one is
            loaded first.
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
        """Compute the module's own tensors with ΔW added to W. A kind overrides it to pack a merged weight itself.

        Args:
            delta: ΔW, (out, in), the sum of all adapters', in fp32 or a wider dtype. It may need gradients.

        Returns:
            New tensors by their local name in the module, each in the shape and dtype of the module's own. By default
            that is W alone: the sum is computed in fp32 or wider, and rounded once. With a `packing`, it is all
            attributes that hold W, as new objects: while adapters are merged, they replace the module's own.

        Raises:
            AdapterError: There is a `packing`, and the kind cannot write a weight.
        """
        if self.packing is not None:
            raise AdapterError(
                f"the {type(self.module).__name__} stores its weight as {self.packing.name}, and {type(self).__name__} "
                "cannot write one: its plugin must define merged, put_ and rounded, or derive it from a kind that does"
            )
        own, packed = self.tensor(self.weight_name), self.pack(delta)
        wide = torch.promote_types(packed.dtype, torch.promote_types(own.dtype, torch.float32))
        return {self.weight_name: (own.to(wide) + packed.to(wide)).to(own.dtype)}

    def put_(self, stored: Mapping[str, Any]) -> None:
        """Replace attributes of the module by what `merged` returned, or by what was there before a merge.

        Only a kind with a `packing` defines it, and the two methods below.
        """
        raise NotImplementedError

    def rounded(self, before: Tensor, delta: Tensor, others: Iterable[Rounding]) -> Rounding:
        """Measure what storing W + ΔW has rounded, which the module holds by now.

        Args:
            before: W as it was, (out, in), in fp32.
            delta: ΔW, (out, in), in fp32.
            others: What the layers before this one have rounded in the same merge.
        """
        raise NotImplementedError

    def unpacked(self, weight: Tensor) -> nn.Module:
        """Build the module that `tunerkit.unwrap` puts in the place of this one: one of torch's, such as ``nn.Linear``.

        Args:
            weight: W, (out, in), in the dtype of the new module. The bias is the module's own.
        """
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer of the module itself by its local name, also while core overrides it for a call.

        Raises:
            AdapterError: The module has none of that name.
        """
        found: Tensor | None = torch_private.own_parameters(self.module).get(name)
        found = dict(self.module.named_buffers(recurse=False)).get(name) if found is None else found
        if found is None:
            raise AdapterError(f"a {type(self.module).__name__} has no parameter or buffer named {name!r}")
        return found

    def matrix(self) -> Tensor:
        """Read W, (out, in), with gradients. Every `linear` kind defines it, and no other."""
        raise NotImplementedError(f"{type(self).__name__} says that it is linear: define matrix()")

    def normalised(self, x: Tensor) -> Tensor:
        """Compute what a norm multiplies by its weight, in the shape and dtype of ``x``. No other kind defines it."""
        raise NotImplementedError(f"a {type(self.module).__name__} is no norm")


# --- Biases: of norms too, which have no base-layer kind --------------------------------------------------------------


def bias_name(base: BaseLayer | None) -> str:
    """The local name of a module's bias."""
    return "bias" if base is None else base.bias_name


def has_trainable_bias(module: nn.Module, base: BaseLayer | None) -> bool:
    """Whether ``module`` has a bias and `view_bias` can shape it."""
    # As strict as base-layer kinds: a norm with its own forward may put its channels anywhere.
    known = base is not None or forward_owner(module) in (nn.LayerNorm, *torch_private.channel_norms())
    return known and torch_private.own_parameters(module).get(bias_name(base)) is not None


def view_bias(module: nn.Module, base: BaseLayer | None, bias: Tensor, y: Tensor) -> Tensor:
    """``bias`` (out,) in a shape that broadcasts over the output ``y`` as the module's own bias does."""
    if base is not None and base.has_weight:
        return base.shape_bias(bias)
    if isinstance(module, nn.LayerNorm):  # the only norm here that adds its bias along the last dimensions
        return bias
    return bias.view(-1, *[1] * (y.dim() - 1 - torch_private.is_batched(module, y)))
