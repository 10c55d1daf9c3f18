"""Averages and scores of weights that are cut over several processes, beside those of whole weights."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tunerkit_adalora.importance import Averages, new_averages, smooth_, stacks_of, triplet_scores, unstack
from tunerkit_adalora.partial_scores import partial_scores, placed_lams
from tunerkit_adalora.svd_layer import apply_masks_
from tunerkit_distributed.shards import Cut

BETA1, BETA2 = 0.85, 0.7
sizes = st.tuples(st.integers(1, 5), st.integers(0, 5), st.integers(1, 5))


def cuts_of(weights: list[Tensor], processes: int, columns: bool) -> list[Cut]:
    """FSDP2 cuts the first dimension; a placement of the user's may cut the last one."""
    return [Cut(tuple(weight.shape), weight.ndim - 1 if columns else 0, processes) for weight in weights]


def smooth_pieces(
    weights: list[Tensor], grads: list[Tensor | None], cuts: list[Cut], averages: list[list[Averages]], restart: bool
) -> list[int]:
    """Take a step in all processes, one after the other. Returns how many weights each left out.

    The first round only listens to what each would send, the second answers with the sum.
    """
    sent: list[Tensor] = []
    counted = []
    for listening in (True, False):
        for process, own in enumerate(averages):
            pieces = [cut.part(weight, process) for weight, cut in zip(weights, cuts, strict=True)]
            slopes = [None if g is None else cut.part(g, process) for g, cut in zip(grads, cuts, strict=True)]
            copies = copy.deepcopy(own)

            if listening:
                smooth_(
                    pieces,
                    slopes,
                    copies,
                    restart=restart,
                    total_=lambda bad: sent.append(bad.clone()),
                    beta1=BETA1,
                    beta2=BETA2,
                )
                continue
            total = torch.stack(sent).sum(0)
            counted.append(
                int(
                    smooth_(
                        pieces, slopes, own, restart=restart, total_=partial(_set_, total), beta1=BETA1, beta2=BETA2
                    )
                )
            )
    return counted


def _set_(total: Tensor, own: Tensor) -> None:
    own.copy_(total)


@given(st.lists(sizes, min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_pieces_have_the_averages_and_scores_of_the_whole(
    shapes: list[tuple[int, int, int]], processes: int, columns: bool, seed: int
) -> None:
    """Averages bit for bit, scores up to the order of a sum, and the same λ, whatever the processes hold.

    A gradient that is not finite in the piece of one process is left out in all of them.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, generator=rng) for out, r, inner in shapes for size in ((out, r), (r,), (r, inner))]
    cuts = cuts_of(weights, processes, columns)
    whole = new_averages(weights)
    pieces = [new_averages([c.part(w, rank) for w, c in zip(weights, cuts, strict=True)]) for rank in range(processes)]
    for step in range(4):
        grads: list[Tensor | None] = [torch.randn(weight.shape, generator=rng) for weight in weights]
        chosen = int(torch.randint(len(weights), (), generator=rng))
        grads[(chosen + 1) % len(grads)] = None
        bad = grads[chosen]
        if step % 2 and bad is not None and bad.numel():
            bad.view(-1)[int(torch.randint(bad.numel(), (), generator=rng))] = torch.nan if step == 1 else torch.inf
        left_out = int(smooth_(weights, grads, whole, restart=step == 2, beta1=BETA1, beta2=BETA2))
        assert smooth_pieces(weights, grads, cuts, pieces, step == 2) == [left_out] * processes
    for process, own in enumerate(pieces):
        for averages, expected in zip(unstack(stacks_of(own)), unstack(stacks_of(whole)), strict=True):
            for average, each, cut in zip(averages, expected, cuts, strict=True):
                assert torch.equal(average, cut.part(each, process))
    full = [tuple(weight.shape) for weight in weights]
    starts = [[(cut.dim, cut.rows(process).start) for cut in cuts] for process in range(processes)]
    shares = [partial_scores(stacks_of(own), full, start) for own, start in zip(pieces, starts, strict=True)]
    for expected_scores, *parts in zip(triplet_scores(stacks_of(whole)), *shares, strict=True):
        assert torch.allclose(sum(parts), expected_scores, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
    lams = [
        placed_lams(
            [cut.part(w, rank) for w, cut in zip(weights, cuts, strict=True)][1::3], full[1::3], starts[rank][1::3]
        )
        for rank in range(processes)
    ]
    for lam, *placed in zip(weights[1::3], *lams, strict=True):
        assert torch.equal(sum(placed), lam)  # type: ignore[arg-type]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_masks_fall_on_the_pieces_of_lambda_that_a_process_holds(processes: int) -> None:
    """Also where a process holds none: together they mask what one process would."""
    lams, masks = (
        [torch.arange(1.0, 6.0), torch.ones(2)],
        [torch.tensor([True, False, True, False, True]), torch.zeros(2) > 1],
    )
    expected = [lam * mask for lam, mask in zip(lams, masks, strict=True)]
    cuts = [Cut(tuple(lam.shape), 0, processes) for lam in lams]
    for process in range(processes):
        own = [cut.part(lam, process) for cut, lam in zip(cuts, lams, strict=True)]
        apply_masks_(own, [cut.part(mask, process) for cut, mask in zip(cuts, masks, strict=True)])
    assert all(torch.equal(lam, each) for lam, each in zip(lams, expected, strict=True))
