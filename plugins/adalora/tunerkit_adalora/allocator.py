"""Allocate a budget: compute masks from the scores of all triplets, and apply the masks to the layers."""

import gc
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from operator import attrgetter

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from tunerkit.errors import warn
from tunerkit.plugin import Cut, Tuner, optimizer_of, shrink_
from tunerkit_adalora.followers import copies_in, follower
from tunerkit_adalora.importance import Part
from tunerkit_adalora.phase import Phase
from tunerkit_adalora.schedule import Allocation
from tunerkit_adalora.svd_form import to_svd_form_
from tunerkit_adalora.svd_layer import SvdLayer, apply_masks_, weights_of
from tunerkit_adalora.training import Training

_MASK = attrgetter("mask")
_STACKS = "stacks of experts keep masked triplets in memory, since each expert keeps others"


def spend_(
    tuner: Tuner,
    training: Training,
    due: Allocation,
    weights: Sequence[nn.Parameter],
    scores: Sequence[Tensor],
    lams: Sequence[Tensor] | None = None,
) -> dict[str, int]:
    """Keep the triplets with the highest scores and mask the others.

    Once the ranks are final, masked triplets leave memory. In an adapter with a stack of matrices none does.

    Args:
        tuner: The adapter's handle.
        training: The adapter's training state.
        due: The budget to spend, and whether the ranks are final afterwards.
        weights: P, λ and Q of each layer, one after the other.
        scores: The score (r,), or (E, r), of each triplet, by layer.
        lams: λ, in the same shapes, if the layers are sharded.

    Returns:
        The new ranks by target path.
    """
    config, bounds, layers, gradients = training.config, training.bounds, training.layers, training.gradients
    if tuner.engine.is_shared:
        tuner.agree_(scores, "the scores")
    masks = allocate(
        scores,
        due.keep,
        costs=training.costs if config.budget_unit == "parameters" else None,
        minimum=bounds.minimum,
        maximum=bounds.maximum,
        # If nothing updates λ, a λ of 0 stays 0, whatever its score.
        lams=None if training.resolved.train_lambda else lams or weights[Part.LAM :: len(Part)],
    )
    found = read_back(gradients.left_out, scores, masks)
    if found.left_out or (gradients.averaged and gradients.seen == 0):
        gradients.judge_(tuner.name, found.left_out)
    gradients.averaged = gradients.seen = 0
    if not found.any_score and due.keep < training.in_force:
        warn(
            f"adapter {tuner.name!r}: every score is 0, so triplets are kept by their position; the gradients are 0 or "
            "too small for fp32 (scale the loss up)"
        )
    ranks = {target.path: rank for target, rank in zip(tuner.targets, found.ranks, strict=True)}
    stacked = any(mask.ndim > 1 for mask in masks)
    cuts = _cuts(weights, masks, found.ranks) if due.final and config.shrink and not stacked else []
    following = _following(weights) if cuts else []
    mask_(tuner, layers, weights, masks, found.ranks)
    training.in_force = due.keep
    if training.resolved.exact_svd:
        _re_parametrise_(tuner, training, scores)
    if due.final:
        training.running = []
        training.phase = Phase.FINAL_MASKED
        # A budget in parameters may be too small for any triplet. Then the loss might depend on no trained weight, and
        # backward would raise.
        if config.shrink and any(found.ranks):
            optimizer = optimizer_of(tuner)
            engine = tuner.engine
            # Shards keep their shapes anyway, so the processes need not agree on it.
            is_alone = not cuts or (engine.splits if engine.is_shared else following in ([], [optimizer]))
            following.clear()  # so that dead objects can be collected
            reason = None if is_alone else follower(tuner, weights, scores[0])
            if stacked:
                reason = _STACKS if sum(found.ranks) < sum(training.sizes) else None
            if (reason := reason or shrink_(cuts, optimizer)) is None:
                for layer, mask, rank in zip(layers, masks, found.ranks, strict=True):
                    layer.set_mask(mask if stacked else mask.new_ones(rank), rank=rank)
                training.phase, training.sizes = Phase.FINAL_SHRUNK, [*found.ranks]
            else:
                _warn_of_kept(tuner, reason)
    return ranks


def mask_(
    tuner: Tuner,
    layers: Sequence[SvdLayer],
    weights: Sequence[nn.Parameter],
    masks: Sequence[Tensor] | None = None,
    ranks: Sequence[int] = (),
) -> None:
    """Zero the λ of masked triplets, in this process's shards.

    Args:
        tuner: The adapter's handle.
        layers: The adapter's layers.
        weights: P, λ and Q of each layer, one after the other.
        masks: New masks, bool (r,), or (E, r); None for the current masks.
        ranks: The number of triplets that each new mask keeps.
    """
    if masks is not None:
        for layer, mask, rank in zip(layers, masks, ranks, strict=True):
            layer.set_mask(mask, rank=rank)
    lams, own = weights[Part.LAM :: len(Part)], [*map(_MASK, layers)]
    if tuner.engine.gives_pieces:
        pieces = tuner.pieces(lams)
        apply_masks_(pieces.values, pieces.cut(own))
    else:
        apply_masks_(lams, own)


def _cuts(weights: Sequence[nn.Parameter], masks: Sequence[Tensor], ranks: Sequence[int]) -> list[Cut]:
    """Return cuts that remove every masked triplet from P, Λ and Q. A masked λ is 0, so the output does not change.

    Further training is the same as with masks, unless a regularizer or clipping is on: these use dead triplets too.
    """
    found: list[Cut] = []
    for index, (mask, rank) in enumerate(zip(masks, ranks, strict=True)):
        if rank < len(mask):
            # The live triplets in order. `nonzero` would make the host wait for their number, which is known.
            kept = torch.sort(mask.to(torch.uint8), descending=True, stable=True).indices[:rank]
            p, lam, q = weights[len(Part) * index :][: len(Part)]
            found += Cut(p, dim=1, kept=kept), Cut(lam, dim=0, kept=kept), Cut(q, dim=0, kept=kept)
    return found


def _following(weights: Sequence[nn.Parameter]) -> list[object]:
    """Return objects that may rely on the weights' shapes: averaged models, and optimizers with state for the weights.

    Torch has no list of these objects. The search takes a tenth of a second, once in a training.
    """
    alive = [each for each in gc.get_objects() if issubclass(type(each), AveragedModel | Optimizer)]
    states = [vars(each).get("state", {}) for each in alive]
    return [each for each, state in zip(alive, states, strict=True) if _relies(each, state, weights)]


def _relies(each: object, state: object, weights: Sequence[nn.Parameter]) -> bool:
    # The state of an Optimizer subclass may be of any type.
    return isinstance(each, AveragedModel) or (isinstance(state, Mapping) and not state.keys().isdisjoint(weights))


def _warn_of_kept(tuner: Tuner, reason: str) -> None:
    """Warn that masked triplets stay in memory, for ``reason``."""
    warn(f"adapter {tuner.name!r}: masked triplets stay in memory, still masked, until training ends: {reason}")


def _re_parametrise_(tuner: Tuner, training: Training, scores: Sequence[Tensor]) -> None:
    """Make P Λ Q the SVD of ΔW, and restart the importance averages, which belong to the old triplets."""
    with tuner.whole() as outside:  # the optimizer may have other Parameter objects
        copies = copies_in(optimizer_of(tuner), map(outside, weights_of(training.layers)))
        if not copies:
            to_svd_form_(training.layers, scores, total=training.resolved.init_rank)
            # Different hardware may choose other signs, and averaged gradients would then mix triplets.
            tuner.agree_(weights_of(training.layers), "the decomposed weights")
    if copies:
        warn(
            f"adapter {tuner.name!r}: the optimizer keeps copies of the weights ({', '.join(copies)}), so allocations "
            "do not re-parametrise P, Λ and Q; to silence this, set exact_svd=False, train_lambda=False, init_rank and "
            "alpha"
        )
        return
    training.phase = Phase.RESTARTING


@attrs.frozen
class Readback:
    """The results of an allocation, copied to the host.

    Attributes:
        left_out: The number of gradients left out of the averages since the last allocation.
        any_score: Whether any score is above 0.
        ranks: The number of live triplets in each mask.
    """

    left_out: int
    any_score: bool
    ranks: tuple[int, ...]


def read_back(left_out: Tensor, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> Readback:
    """Copy all values that the host needs from the device, in one transfer.

    Args:
        left_out: The number of gradients left out; 0-d int64.
        scores: The scores of each target's triplets.
        masks: The bool mask of each target, in the shape of the scores.

    Returns:
        The values on the host.
    """
    kept = torch.cat([mask.flatten() for mask in masks]).cumsum(0)
    above = (torch.cat([score.flatten() for score in scores]) > 0).any()
    bad, above_zero, *counted = torch.cat([left_out.to(kept.device).view(1), above.view(1), kept]).tolist()
    ends = accumulate(mask.numel() for mask in masks)
    totals = [0, *(counted[end - 1] if end else 0 for end in ends)]
    return Readback(bad, bool(above_zero), tuple(after - before for before, after in pairwise(totals)))


@torch.no_grad()
def allocate(
    scores: Sequence[Tensor],
    keep: int,
    *,
    costs: Sequence[int] | None = None,
    minimum: Sequence[int] | None = None,
    maximum: Sequence[int] | None = None,
    lams: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Spend the budget ``keep`` on the triplets with the highest scores, over all targets together.

    All triplets form one ranking in three tiers: the best ``minimum`` of each matrix, then triplets within its
    ``maximum``, then the rest. So a maximum is exceeded only if the budget cannot be spent otherwise. In each tier the
    higher score comes first; ties go to the earlier target, then to the earlier matrix of a stack, then to the lower
    index. −0.0 equals 0.0, and NaN is lowest. The longest prefix of the ranking whose cost fits ``keep`` stays. The
    ranking does not depend on ``keep``, so with the same scores, a lower budget keeps a subset. The host does not wait
    for the device.

    Args:
        scores: One tensor (r_i,) per target; for a stack of matrices (E_i, r_i).
        keep: The budget, in the unit of ``costs``.
        costs: Cost of one triplet of each target, above 0; by default 1, so that exactly ``keep`` triplets stay.
        minimum: The fewest triplets of each target's matrix, or of each matrix of its stack, as long as the budget
            allows it; by default 0.
        maximum: The most triplets of each target's matrix, or of each matrix of its stack; by default all.
        lams: λ of each target, in the shape of its scores, if nothing updates λ, so that a λ of 0 stays 0. A triplet
            with λ = 0 ranks last in its tier and is never kept, even if the budget allows it.

    Returns:
        One bool mask per target, in the shape of its scores: views of one tensor, on the first score's device.
    """
    if not scores:
        return []
    ranks, sizes = [score.shape[-1] for score in scores], [score.numel() for score in scores]
    nothing, one = [0] * len(ranks), [1] * len(ranks)
    limits = torch.tensor([ranks, costs or one, minimum or nothing, maximum or ranks])
    if any(score.ndim > 1 for score in scores):
        limits = limits.repeat_interleave(torch.tensor([score.shape[:-1].numel() for score in scores]), dim=1)
    flat = torch.cat([score.to(scores[0].device).flatten() for score in scores])
    alive = None if lams is None else torch.cat([lam.to(flat.device).flatten() for lam in lams]).ne(0)
    masks = torch.split(_keep(flat, keep, limits, alive, total=sum(sizes)), sizes)
    return [mask if own.ndim == 1 else mask.view(own.shape) for mask, own in zip(masks, scores, strict=True)]


def _keep(scores: Tensor, keep: int, limits: Tensor, alive: Tensor | None, *, total: int) -> Tensor:
    """Return the mask (n,) of all triplets; ``limits`` (4, matrices): size, cost, minimum and maximum of each."""
    flat = _sortable(scores)
    if alive is not None:
        flat = flat.where(alive, -torch.inf)
    size, cost, least, most = limits.to(flat.device, non_blocking=True)
    owner = torch.repeat_interleave(size, output_size=total)

    by_score = torch.sort(flat, descending=True, stable=True).indices
    standing = _standings(by_score, owner, size)
    tier = torch.where(standing < least[owner], 0, torch.where(standing < most[owner], 1, 2))
    order = by_score[torch.sort(tier[by_score], stable=True).indices]
    spent = torch.cumsum(cost[owner[order]], dim=0)

    kept = torch.empty_like(owner, dtype=torch.bool)
    kept[order] = spent <= keep
    if alive is not None:
        kept &= alive
    return kept


def _sortable(scores: Tensor) -> Tensor:
    """Return scores for sorting, in fp32 or wider: NaN becomes −∞, and −0.0 becomes 0.0.

    A radix sort compares bits, in which −0.0 is below 0.0; adding 0.0 removes the sign.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.where(wide.isnan(), -torch.inf, wide) + 0.0


def _standings(by_score: Tensor, owner: Tensor, size: Tensor) -> Tensor:
    """Return the rank (n,) of each triplet within its matrix, from 0 for the best, given a best-first order (n,)."""
    grouped = by_score[torch.sort(owner[by_score], stable=True).indices]
    start = torch.cumsum(size, dim=0) - size
    standing = torch.empty_like(owner)
    standing[grouped] = torch.arange(owner.numel(), device=owner.device) - start[owner]
    return standing
