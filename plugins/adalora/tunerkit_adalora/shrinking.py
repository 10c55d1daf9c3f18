"""Remove dead triplets from memory, once the distribution of the budget is final."""

import warnings
from collections.abc import Iterator, Sequence

import torch

from tunerkit import Cut, Tuner, TunerkitWarning, optimizer_of, shrink_
from tunerkit_adalora.svd_layer import SvdLayer


@torch.no_grad()
def shrink_layers_(tuner: Tuner, layers: Sequence[SvdLayer]) -> bool:
    """Cut every masked triplet out of P, Λ and Q, and out of the optimizer's state.

    A masked λ is 0, so the output stays. Without a regulariser or clipping, which look at dead triplets too, training
    continues as it would with masks. Where the shapes must stay, the masks stay too, and a warning says so.

    Args:
        tuner: The tuner, whose optimizer's state is cut along.
        layers: Its layers, with the final masks.

    Returns:
        Whether no mask is needed any more.
    """
    masked = [layer for layer in layers if layer.rank < len(layer.mask)]
    if not any(layer.rank for layer in layers):
        # A budget in parameters may buy nothing. Without any triplet the loss might depend on no trained weight, and
        # backward would raise.
        return False
    reason = shrink_([cut for layer in masked for cut in _cuts(layer)], optimizer_of(tuner))
    if reason is not None:
        warnings.warn(
            f"adapter {tuner.name!r}: the masked triplets stay in memory, and masked, to the end of training: {reason}",
            TunerkitWarning,
            stacklevel=2,
        )
        return not masked
    for layer in masked:
        layer.set_mask(layer.mask.new_ones(layer.rank), rank=layer.rank)
    return True


def _cuts(layer: SvdLayer) -> Iterator[Cut]:
    # The live triplets in their order. `nonzero` would make the host wait for their number, which is known.
    kept = torch.sort(layer.mask.to(torch.uint8), descending=True, stable=True).indices[: layer.rank]
    yield Cut(layer.p, dim=1, kept=kept)
    yield Cut(layer.lam, dim=0, kept=kept)
    yield Cut(layer.q, dim=0, kept=kept)
