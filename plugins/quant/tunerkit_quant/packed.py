"""Linear layers whose weight a quantiser stores packed: what all their kinds share, and what merging rounds in them."""

import abc
import copy
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.plugin import BaseLayer, Packing, Rounding

_LEAST = 1e-30  # a weight of zeros has no relative error


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
        return F.linear(F.dropout(x, dropout) if dropout > 0 else x, q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(..., r) to (..., out)."""
        return F.linear(h, p)

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in), unchanged: it is `requantised` that packs."""
        return weight

    def matrix(self) -> Tensor:
        """Return `dense`: a packed weight is frozen, so it has no gradients."""
        return self.dense()

    def requantised(self, weight: Tensor) -> Mapping[str, Any]:
        """Store another W as the module stores its own, with the quantiser of its library. The module is only read.

        Args:
            weight: W, (out, in), in fp32 or a wider dtype.

        Returns:
            The module's attributes that hold W, by name: parameters, buffers, and what describes them. All are new
            objects. While the adapters are merged, they replace the module's own, which are kept as they are.

        Raises:
            AdapterError: The kind cannot write a weight. This is the default.
        """
        raise AdapterError(
            f"the {type(self.module).__name__} stores its weight as {self.packing.name}, and {type(self).__name__} "
            "cannot write one. Use tunerkit.unwrap(model, keep_merged=True, dtype=torch.bfloat16), which replaces such "
            "layers by nn.Linear, or load the adapter onto the unquantised base and merge there"
        )

    def merged(self, delta: Tensor) -> dict[str, Any]:
        """Store W + ΔW: what `requantised` returns for the sum. Raises `AdapterError` if that is not finite."""
        total = self.dense().to(delta.dtype) + delta
        if not total.isfinite().all():  # packed, it would be numbers again
            raise AdapterError(
                f"the weight of the {type(self.module).__name__} and its adapters add up to NaN or inf. Nothing "
                "was changed. Check the adapter's own weights"
            )
        return dict(self.requantised(total))

    def put_(self, stored: Mapping[str, Any]) -> None:
        """Replace attributes. What was kept while the model moved to another device or dtype is moved there now."""
        module = self.module
        for name, value in stored.items():
            before = _device_of(module)
            setattr(module, name, _cast(value, getattr(module, name, None)))
            if (device := _device_of(module)) is not None and before is not None and device != before:
                module.to(before)

    @torch.no_grad()
    def rounded(self, before: Tensor, delta: Tensor, others: Iterable[Rounding]) -> Rounding:
        """Measure what merging has rounded. The quantiser's own error is measured at the first of its layers."""
        wanted, name = before + delta, self.packing.name
        own = next((each.own for each in others if each.stored_as == name), None)
        return Rounding(
            stored_as=name,
            bits=self.packing.bits,
            added=_relative(self.dense().to(wanted.dtype) - wanted, wanted),
            own=self._own_error(before) if own is None else own,
            change=_relative(delta, wanted),
        )

    def unpacked(self, weight: Tensor) -> nn.Module:
        """Build an ``nn.Linear`` with W and the module's own bias."""
        bias = self.bias()
        dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.to(weight.dtype, copy=True), requires_grad=False)
        return dense.train(self.module.training)

    def _own_error(self, weight: Tensor) -> float:
        """The relative error of storing a random matrix as the module stores its weight."""
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(weight.shape, generator=generator).to(weight) * weight.std(dim=1, keepdim=True)
        stored = _twin_of(self, self.requantised(sample)).dense()
        return _relative(stored.to(sample.dtype) - sample, sample)


def _twin_of(base: BaseLayer, attributes: Mapping[str, Any]) -> BaseLayer:
    """A base layer like ``base`` with other attributes. The two share everything else; neither is changed."""
    module = copy.copy(base.module)
    # A shallow copy shares the dicts that hold parameters and buffers.
    vars(module).update({name: dict(own) for name, own in vars(module).items() if type(own) is dict})
    for name, value in attributes.items():
        setattr(module, name, value)
    return type(base)(module)


def _cast(kept: Any, live: Any) -> Any:
    """``kept`` in the dtype of ``live``, where both are packed weights that have one, as torchao's of few bits do."""
    if not (isinstance(kept, nn.Parameter) and isinstance(live, nn.Parameter)) or kept.dtype == live.dtype:
        return kept
    if not (kept.is_floating_point() and live.is_floating_point()):
        return kept
    return nn.Parameter(kept.detach().to(live.dtype), requires_grad=kept.requires_grad)


def _device_of(module: nn.Module) -> Any:
    return next((parameter.device for parameter in module.parameters(recurse=False)), None)


def _relative(error: Tensor, wanted: Tensor) -> float:
    return float(error.norm() / wanted.norm().clamp_min(_LEAST))
