"""What merging rounds away in weights that a quantiser stores: measured at each merge, and warned of."""

import warnings
from collections.abc import Iterable

import attrs
import torch
from torch import Tensor, nn

from tunerkit import injection
from tunerkit.errors import TunerkitWarning
from tunerkit.injection import Slots
from tunerkit.layers import BaseLayer
from tunerkit.serialization.whole import twin_of

_FEW_BITS = 4
_LEAST = 1e-30  # a weight of zeros has no relative error


@attrs.frozen
class Rounding:
    """What storing a merged weight W + ΔW again has rounded. Errors are Frobenius norms, relative to that of W + ΔW.

    Attributes:
        stored_as: The quantiser, such as ``"bitsandbytes nf4"``.
        bits: Its bits.
        added: The error that merging added: that of the stored sum.
        own: The quantiser's own error, on a matrix of normally distributed numbers with rows of the same size.
        change: The size of ΔW. An error above it means that merging loses more than the adapters had changed.
    """

    stored_as: str
    bits: float
    added: float
    own: float
    change: float


def rounding(model: nn.Module) -> dict[str, Rounding]:
    """Return what merging into quantised layers has rounded.

    Args:
        model: A merged model.

    Returns:
        The errors by the layer's path; empty without quantised layers, or if the model is not merged.

    Raises:
        AdapterError: The model has no adapter.
    """
    injection.require_tuners(model)
    noted = ((path, slots.rounding) for path, _, slots in injection.walk(model) if slots.merged)
    return {path: found for path, found in noted if isinstance(found, Rounding)}


@torch.no_grad()
def note_rounding_(slots: Slots, before: Tensor, delta: Tensor, own: dict[str, float]) -> None:
    """Measure what a module's merged weight has rounded, where a quantiser stores it.

    Args:
        slots: The module's slots; the merged weight is in the module.
        before: W, (out, in), as it was.
        delta: ΔW, (out, in).
        own: The own errors of quantisers by name, each measured once; new ones are added.
    """
    base = slots.base
    if base is None or base.packing is None:
        return
    wanted, name = before + delta, base.packing.name
    if name not in own:
        own[name] = _own_error(base, before)
    slots.rounding = Rounding(
        stored_as=name,
        bits=base.packing.bits,
        added=_relative(base.dense().to(wanted.dtype) - wanted, wanted),
        own=own[name],
        change=_relative(delta, wanted),
    )


def is_below_rounding(slots: Slots) -> bool:
    """Whether what the adapters add to a packed weight is less than the quantiser rounds, so that it may be lost."""
    found = slots.rounding
    return isinstance(found, Rounding) and found.change <= found.own


def warn_of_rounding(places: Iterable[tuple[str, nn.Module, Slots]]) -> None:
    """Warn of merges into weights of few bits: their rounding may be as large as what the adapters add."""
    found = [slots.rounding for _, _, slots in places if isinstance(slots.rounding, Rounding)]
    coarse = [each for each in found if each.bits <= _FEW_BITS]
    if coarse:
        added, own, change = (
            sum(getattr(each, name) for each in coarse) / len(coarse) for name in ("added", "own", "change")
        )
        warnings.warn(
            f"merged into {len(coarse)} weights of {coarse[0].bits:g} bits ({coarse[0].stored_as}): storing the sums "
            f"again added an error of {added:.1%} of the weights on average, beside the quantiser's own of {own:.1%}; "
            f"the adapters had changed them by {change:.1%}. tunerkit.unwrap(model, keep_merged=True, "
            "dtype=torch.bfloat16) merges without that error, into dense layers. tunerkit.rounding(model) lists each "
            "layer",
            TunerkitWarning,
            stacklevel=4,
        )


def _own_error(base: BaseLayer, weight: Tensor) -> float:
    """The relative error of storing a random matrix as ``base`` stores its weight."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(weight.shape, generator=generator).to(weight) * weight.std(dim=1, keepdim=True)
    stored = twin_of(base, dict(base.requantised(sample))).dense()
    return _relative(stored.to(sample.dtype) - sample, sample)


def _relative(error: Tensor, wanted: Tensor) -> float:
    return float(error.norm() / wanted.norm().clamp_min(_LEAST))
