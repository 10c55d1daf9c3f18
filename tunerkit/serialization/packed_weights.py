"""Checks that a merge into a packed weight took effect: such a weight need not become what is assigned to it."""

from collections.abc import Container

import attrs
import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.injection import Slots
from tunerkit.layers import BaseLayer


@attrs.frozen(eq=False)
class PackedSum:
    """What a merge should make of a packed weight.

    Attributes:
        before: W, (out, in), as it was.
        delta: The sum of the adapters' ΔW, (out, in).
    """

    before: Tensor
    delta: Tensor

    @torch.no_grad()
    def is_reached_by(self, slots: Slots) -> bool:
        """Return whether the base layer's weight is nearer to W + ΔW than to W: packing may round to four bits."""
        assert slots.base is not None
        after = slots.base.dense().float()
        if slots.base.packing is not None:  # its quantiser may round most of a small delta away, which a warning says
            return not torch.equal(after, self.before) or not self.delta.any()
        missing = after - self.before - self.delta
        return bool(missing.norm() <= self.delta.norm() / 2) or not self.delta.any()


@torch.no_grad()
def packed_sum(path: str, slots: Slots, merged: Container[str]) -> PackedSum | None:
    """Compute what a merge should make of a module's weight, before it is written.

    Args:
        path: The module's name in errors.
        slots: Its slots.
        merged: The local names of the tensors that the merge replaces.

    Returns:
        The sum; None for a weight that is a plain matrix, which becomes what is assigned to it, or is not replaced.
    """
    base = slots.base
    if base is None or (base.packing is None and _is_plain(base, merged)):
        return None
    deltas = [hooks.delta(path, slot.method, slot.adapter, base).weight for slot in slots.applied if slot.adapter]
    if base.packing is not None and all(each is None for each in deltas):
        return None
    total = sum((each.float() for each in deltas if each is not None), torch.zeros(()))
    return PackedSum(before=base.dense().float().clone(), delta=total)


def _is_plain(base: BaseLayer, merged: Container[str]) -> bool:
    """Whether a weight becomes what is assigned to it, or is not replaced."""
    if base.weight_name not in merged:
        return True
    weight = base.tensor(base.weight_name)
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
