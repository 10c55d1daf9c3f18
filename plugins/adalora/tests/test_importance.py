"""Importance compared with a float64 loop written from the paper, number by number."""

import attrs
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tunerkit_adalora.allocator import allocate
from tunerkit_adalora.importance import new_averages, smooth_, stacks_of, triplet_scores, unstack
from tunerkit_adalora.schedule import plan
from tunerkit_testing.counting import Counting

Array = npt.NDArray[np.float64]
BETA1, BETA2 = 0.85, 0.7
seeds = st.integers(0, 2**32 - 1)


class PaperLayer:
    """One layer's weights and averages as plain arrays, with Eq. 8-13 as loops over single numbers."""

    def __init__(self, rng: np.random.Generator, out: int, rank: int, inner: int) -> None:
        self.weights: list[Array] = [rng.normal(size=s) for s in ((out, rank), (rank,), (rank, inner))]
        self.sensitivity = [np.zeros_like(w) for w in self.weights]
        self.uncertainty = [np.zeros_like(w) for w in self.weights]

    def smooth(self, grads: list[Array]) -> None:
        for w, g, mean, spread in zip(self.weights, grads, self.sensitivity, self.uncertainty, strict=True):
            if not np.isfinite(g).all():
                continue
            for at in np.ndindex(w.shape):
                now = abs(w[at] * g[at])  # Eq. 8
                mean[at] = BETA1 * mean[at] + (1 - BETA1) * now  # Eq. 9
                spread[at] = BETA2 * spread[at] + (1 - BETA2) * abs(now - mean[at])  # Eq. 10

    def scores(self) -> list[float]:
        p, lam, q = (mean * spread for mean, spread in zip(self.sensitivity, self.uncertainty, strict=True))  # Eq. 11
        return [lam[i] + sum(p[:, i]) / len(p) + sum(q[i]) / len(q[i]) for i in range(len(lam))]  # Eq. 12, 13


def paper_allocation(scores: list[list[float]], keep: int) -> list[list[bool]]:
    """The best ``keep`` of all triplets; earlier ones win ties."""
    order = sorted((-score, layer, i) for layer, row in enumerate(scores) for i, score in enumerate(row))
    kept = {(layer, i) for _, layer, i in order[:keep]}
    return [[(layer, i) in kept for i in range(len(row))] for layer, row in enumerate(scores)]


def random_grads(rng: np.random.Generator, layer: PaperLayer) -> list[Array]:
    """Realistic gradients of any size, sometimes zero for a whole layer or with a non-finite number."""
    scale = 0.0 if rng.random() < 0.1 else 10.0 ** rng.integers(-4, 3)
    grads: list[Array] = [scale * rng.normal(size=w.shape) for w in layer.weights]
    if rng.random() < 0.15:
        bad = grads[rng.integers(3)]
        bad.flat[rng.integers(bad.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return grads


@given(seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_many_steps_agree_with_the_paper_written_as_loops(seed: int, alike: bool) -> None:
    """Over a whole training, averages, scores and masks equal those of the paper's formulas computed one by one.

    Layers of one shape are averaged together, layers of a unique shape alone; an unused layer keeps its averages.
    """
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(1, 5, size=3) for _ in range(3)]
    layers = [PaperLayer(rng, *(sizes[0] if alike else size)) for size in sizes]
    total = sum(len(layer.weights[1]) for layer in layers)
    target = int(rng.integers(1, total + 1))
    schedule = plan(total_steps=16, t_init=2, t_final=3, delta_t=int(rng.integers(1, 5)), initial=total, target=target)
    flat = new_averages([weight for layer in layers for weight in tensors(layer.weights)])
    stacks = stacks_of(flat)
    assert not alike or len(stacks) == 3
    for step in range(1, 17):
        unused = int(rng.integers(0, 6))
        grads: list[Tensor | None] = []
        left_out = 0
        for number, layer in enumerate(layers):
            slopes = random_grads(rng, layer)
            if number == unused:
                grads += [None] * 3
                continue
            grads += tensors(slopes)
            left_out += sum(not np.isfinite(g).all() for g in slopes)
            layer.smooth(slopes)
        weights = [weight for layer in layers for weight in tensors(layer.weights)]
        assert smooth_(weights, grads, flat, beta1=BETA1, beta2=BETA2).item() == left_out
        scores = triplet_scores(stacks)
        for ours, layer in zip(scores, layers, strict=True):
            np.testing.assert_allclose(ours.numpy(), layer.scores(), rtol=1e-12, atol=0)
        if schedule.due(step - 1, step) is not None:
            masks = allocate(scores, schedule.budget(step))
            expected = paper_allocation([layer.scores() for layer in layers], schedule.budget(step))
            assert [mask.tolist() for mask in masks] == expected
            for layer, mask in zip(layers, masks, strict=True):
                layer.weights[1] *= mask.numpy()
        for layer in layers:
            for w in layer.weights:
                w += 0.1 * rng.normal(size=w.shape)


def tensors(arrays: list[Array]) -> list[Tensor]:
    """Copies, so that nothing the code under test writes reaches the oracle."""
    return [torch.tensor(a) for a in arrays]


def averaged(weights: list[Tensor], grads: list[Tensor], steps: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Ī and Ū of each weight after repeating the same step."""
    flat = new_averages(weights)
    stacks = stacks_of(flat)
    for _ in range(steps):
        smooth_(weights, grads, flat, beta1=BETA1, beta2=BETA2)
    return unstack(stacks)


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=30)
def test_averages_of_narrow_weights_are_kept_in_fp32(seed: int, dtype: torch.dtype) -> None:
    """Half-precision weights are averaged as if they and their gradients were fp32."""
    generator = torch.Generator().manual_seed(seed)
    w = (1e-4 * torch.randn(3, 2, generator=generator)).to(dtype)
    g = (1e-4 * torch.randn(3, 2, generator=generator)).to(dtype)
    narrow, wide = averaged([w], [g], 3), averaged([w.float()], [g.float()], 3)
    assert narrow[0][0].dtype == torch.float32
    assert narrow[0][0].count_nonzero() == (w.float() * g.float()).count_nonzero() > 0
    for ours, expected in zip(narrow, wide, strict=True):
        assert torch.equal(ours[0], expected[0])


def test_averages_of_double_weights_stay_double() -> None:
    """fp64 isn't converted to fp32."""
    assert new_averages([torch.ones(2, dtype=torch.float64)])[0].sensitivity.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_bad_gradient_never_reaches_the_averages(bad: float, weight: float) -> None:
    """One non-finite value skips the whole weight and counts it; others of its shape are averaged as usual."""
    weights = [torch.tensor(w) for w in ([2.0, weight], [3.0], [4.0, 5.0], [6.0, 7.0])]
    grads = [torch.tensor(g) for g in ([1.0, bad], [1.0], [1.0, 1.0], [1.0, 1.0])]
    flat = new_averages(weights)
    stacks = stacks_of(flat)
    assert [stack.members for stack in stacks] == [(0, 3), (1,), (2,)]
    for stack in stacks:
        stack.sensitivity.uniform_(1, 9)
        stack.uncertainty.uniform_(1, 9)
    before = [[average.clone() for average in averages] for averages in unstack(stacks)]
    skipped = smooth_(weights, grads, flat, beta1=BETA1, beta2=BETA2)
    assert (skipped.ndim, skipped.dtype, skipped.item()) == (0, torch.int64, 1)
    for ours, old in zip(unstack(stacks), before, strict=True):
        assert [torch.equal(now, then) for now, then in zip(ours, old, strict=True)] == [True, False, False, False]


def test_a_product_that_overflows_counts_as_bad() -> None:
    """A finite gradient with infinite sensitivity is skipped too: an infinity would never decay."""
    flat = new_averages([torch.ones(1)])
    stacks = stacks_of(flat)
    skipped = smooth_([torch.tensor([1e30])], [torch.tensor([1e30])], flat, beta1=BETA1, beta2=BETA2)
    assert skipped.item() == 1
    assert stacks[0].sensitivity.item() == stacks[0].uncertainty.item() == 0


def test_the_largest_finite_gradients_are_not_bad() -> None:
    """The check for bad numbers doesn't overflow itself."""
    w, g = torch.full((64,), 1e-3), torch.full((64,), torch.finfo(torch.float32).max)
    assert smooth_([w], [g], new_averages([w]), beta1=BETA1, beta2=BETA2).item() == 0


@given(seeds, st.integers(-20, 20))
@settings(max_examples=30)
def test_scores_scale_with_the_square_of_the_gradients(seed: int, power: int) -> None:
    """Gradients times 2^k give scores times exactly 4^k, so masks do not depend on the loss's scale."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 3), (3,), (3, 5))]
    grads = [[torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights] for _ in range(4)]

    def scores(scale: float) -> Tensor:
        flat = new_averages(weights)
        stacks = stacks_of(flat)
        for step in grads:
            smooth_(weights, [scale * g for g in step], flat, beta1=BETA1, beta2=BETA2)
        return triplet_scores(stacks)[0]

    assert torch.equal(scores(2.0**power), 4.0**power * scores(1.0))


def test_layers_of_rank_zero_have_no_scores_and_are_not_bad() -> None:
    """A rank of zero is valid."""
    weights = [torch.ones(4, 0), torch.ones(0), torch.ones(0, 3)]
    flat = new_averages(weights)
    stacks = stacks_of(flat)
    assert smooth_(weights, weights, flat, beta1=BETA1, beta2=BETA2).item() == 0
    assert [score.shape for score in triplet_scores(stacks)] == [(0,)]


@given(st.lists(st.sampled_from([0, 1, 3, 40]), min_size=1, max_size=8), seeds)
@settings(max_examples=30, deadline=None)
def test_weights_of_one_shape_are_averaged_as_each_alone(sizes: list[int], seed: int) -> None:
    """However they are grouped, every weight is averaged once and every bad one counted once."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, generator=generator) for n in sizes]
    grads = [torch.randn(n, generator=generator) for n in sizes]
    for bad in grads[::3]:
        bad[:1] = torch.nan
    flat = new_averages(weights)
    stacks = stacks_of(flat)
    skipped = smooth_(weights, grads, flat, beta1=BETA1, beta2=BETA2)
    assert skipped.item() == sum(bool(g.isnan().any()) for g in grads)
    for number, together in enumerate(zip(*unstack(stacks), strict=True)):
        alone = averaged([weights[number]], [grads[number]])
        assert all(torch.equal(ours, other[0]) for ours, other in zip(together, alone, strict=True))


def test_nothing_to_average_is_nothing_left_out() -> None:
    """Without weights, nothing is counted as skipped."""
    assert smooth_([], [], [], beta1=BETA1, beta2=BETA2).item() == 0
    assert triplet_scores([]) == []


def test_the_host_never_waits_for_the_device() -> None:
    """It runs on meta tensors, which have no values, so nothing reads a value."""
    weights = [torch.ones(s, device="meta") for s in ((4, 3), (3,), (3, 5))]
    flat = new_averages(weights)
    stacks = stacks_of(flat)
    assert smooth_(weights, weights, flat, beta1=BETA1, beta2=BETA2).is_meta
    scores = triplet_scores(stacks)
    assert allocate([*scores, *scores], 4, minimum=[1, 1])[0].is_meta


def test_averages_are_updated_where_they_are_and_weights_not_at_all() -> None:
    """Only the two averages change, in place; parameters may require gradients."""
    w = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    g = torch.tensor([0.5, 1.0])
    flat = new_averages([w])
    (stack,) = stacks_of(flat)
    place = stack.sensitivity.data_ptr()
    smooth_([w], [g], flat, beta1=0.5, beta2=0.5)
    assert stack.sensitivity.data_ptr() == place
    assert stack.sensitivity.tolist() == [[0.5, 1.5]]  # half of |w·g| = 1, 3
    assert stack.uncertainty.tolist() == [[0.25, 0.75]]  # half of |1 − 0.5|, |3 − 1.5|
    assert w.tolist() == [2.0, -3.0]
    assert g.tolist() == [0.5, 1.0]


def test_the_number_of_operations_scales_with_shapes_and_not_with_layers() -> None:
    """Twice as many layers of the same shapes need the same number of dispatched operations."""
    counts = []
    for depth in (2, 9):
        weights = [torch.ones(s) for _ in range(depth) for s in ((4, 3), (3,), (3, 5))]
        flat = new_averages(weights)
        stacks = stacks_of(flat)
        with Counting() as mode:
            smooth_(weights, weights, flat, beta1=BETA1, beta2=BETA2)
            allocate(triplet_scores(stacks), 4)
        counts.append(mode.count)
    assert counts[0] == counts[1] < 120


def test_averages_take_twice_the_memory_of_the_weights_and_little_more() -> None:
    """Weights begin rows of their own. Layers 256 wide of rank 8 lose under 2 % to that, wider ones less."""
    for width, most in ((256, 2.04), (1024, 2.01)):
        weights = [torch.zeros(size) for _ in range(3) for size in ((width, 8), (8,), (8, width))]
        found = new_averages(weights)
        held = sum(
            tensor.nbytes
            for each in found
            for tensor in attrs.asdict(each, recurse=False).values()
            if isinstance(tensor, Tensor)
        )
        assert 2 <= held / sum(weight.nbytes for weight in weights) <= most


def test_weights_without_a_gradient_take_operations_by_shape_too() -> None:
    """As many for two layers as for forty, half of them unused."""

    def dispatched(layers: int) -> int:
        weights = [torch.ones(size) for _ in range(layers) for size in ((8, 2), (2,), (2, 8))]
        grads = [None if at < len(weights) // 2 else torch.ones_like(weight) for at, weight in enumerate(weights)]
        found = new_averages(weights)
        with Counting() as mode:
            smooth_(weights, grads, found, beta1=BETA1, beta2=BETA2)
        return mode.count

    assert dispatched(2) == dispatched(40)
