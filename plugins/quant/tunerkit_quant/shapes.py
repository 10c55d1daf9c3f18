"""Whether a packed weight has the size that its layer says."""

from collections.abc import Sequence

from tunerkit_quant.packed import PackedLinear


def misfit(base: PackedLinear, packed: Sequence[int]) -> str | None:
    """Return why a packed weight does not fit its layer, as the end of a sentence about it; None if it does.

    Args:
        base: The layer.
        packed: The shape of the matrix that its weight unpacks to, (out, in).
    """
    wanted = (base.out_features, base.in_features)
    if tuple(packed) == wanted:
        return None
    return f"has a packed weight of shape {tuple(packed)}, and its features say {wanted}: quantise the model again"


def miscount(base: PackedLinear, what: str, found: int, wanted: int) -> str | None:
    """Return why a part of a packed weight does not fit the rest, as `misfit` does.

    Args:
        base: The layer.
        what: The part, in the plural.
        found: How many there are.
        wanted: How many the layer needs.
    """
    if found == wanted:
        return None
    shape = (base.out_features, base.in_features)
    return f"has {found} {what}, and a packed weight of shape {shape} needs {wanted}: quantise the model again"
