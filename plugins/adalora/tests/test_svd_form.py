"""The SVD re-parametrisation at an allocation: ΔW stays, triplets become singular triplets, all else is unchanged."""

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import tunerkit
from plugins.adalora.tests.short_training import SETTINGS, TOTAL, attached, layers, wrapped
from tunerkit_adalora import AdaLoraConfig
from tunerkit_adalora.svd_form import to_svd_form_
from tunerkit_adalora.svd_layer import SvdLayer, weights_of
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import TARGETS, X, loss_of, step, train


def random_layer(out: int, into: int, mask: list[bool], seed: int = 0, dtype: torch.dtype = torch.float64) -> SvdLayer:
    generator = torch.Generator().manual_seed(seed)
    layer = SvdLayer(in_features=into, out_features=out, rank=len(mask), scale=0.5, dropout=0.0, start="lora").to(dtype)
    with torch.no_grad():
        for weight in layer.weights:
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        layer.mask = torch.tensor(mask)
        layer.lam.masked_fill_(~layer.mask, 0.0)
    return layer


def rotate(layers: list[SvdLayer], *, total: float) -> None:
    """Rotate ``layers``; earlier triplets are more important."""
    to_svd_form_(layers, [torch.arange(len(layer.lam), 0, -1.0) for layer in layers], total=total)


def added(layer: SvdLayer) -> Tensor:
    return ((layer.p * layer.lam) @ layer.q).detach().double()


def weights(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for layer in layers(model) for weight in layer.weights]


def started(make: Any = torch.optim.AdamW, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = wrapped(**{"exact_svd": True, **changes})
    return model, attached(model, make=make)


# --- The arithmetic ---------------------------------------------------------------------------------------------------


@given(
    out=st.integers(1, 9),
    into=st.integers(1, 9),
    mask=st.lists(st.booleans(), min_size=1, max_size=5).filter(any),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_triplets_become_those_of_the_svd(out: int, into: int, mask: list[bool], seed: int) -> None:
    """ΔW stays; live triplets become its singular triplets in their order, and dead ones are unchanged."""
    layer = random_layer(out, into, mask, seed)
    before, dead = added(layer), [weight.detach().clone() for weight in layer.weights]
    live = layer.mask
    length = layer.q[live].square().sum(1).mean().sqrt()
    rotate([layer], total=6.0)
    torch.testing.assert_close(added(layer), before, rtol=1e-9, atol=1e-9)
    assert float(layer.lam.sum().detach()) == pytest.approx(6.0)
    assert (layer.lam[live].diff() <= 0).all()

    number = min(sum(mask), out, into)  # of singular values above 0
    sizes = (layer.lam * layer.p.norm(dim=0) * layer.q.norm(dim=1)).detach()[live]
    expected = torch.linalg.svdvals(before)[:number]
    torch.testing.assert_close(sizes[:number], expected, rtol=1e-6, atol=1e-9)
    assert (sizes[number:] < 1e-9 * expected[0]).all()
    rows = layer.q.detach()[live][:number]
    torch.testing.assert_close(rows @ rows.T, torch.eye(number, dtype=rows.dtype) * length**2, rtol=1e-6, atol=1e-9)
    large = expected > 1e-3 * expected[0]
    columns = layer.p.detach()[:, live][:, :number][:, large]
    common = (expected.sum() / (6.0 * length)).square()
    size = int(large.sum())
    torch.testing.assert_close(
        columns.T @ columns / common, torch.eye(size, dtype=rows.dtype), rtol=0.1, atol=0.01 if size > 1 else 0.1
    )

    for weight, old, along in zip(layer.weights, dead, (1, 0, 0), strict=True):
        left = (~live).nonzero().flatten()
        assert torch.equal(weight.index_select(along, left), old.index_select(along, left))


def test_shares_of_lambda_are_proportional_to_the_singular_values() -> None:
    """If none is too small, λ = total · Σ / sum Σ, and all columns of P have the same length."""
    layer = random_layer(9, 7, [True] * 3)
    expected = torch.linalg.svdvals(added(layer))[:3]
    rotate([layer], total=3.0)
    torch.testing.assert_close(layer.lam.detach(), 3.0 * expected / expected.sum())
    torch.testing.assert_close(layer.p.norm(dim=0), layer.p.norm(dim=0).mean().expand(3))


def test_layers_are_rotated_alike_together_and_alone() -> None:
    """Layers of one shape are one batch; a batch of one gives the same, whatever the masks are."""
    masks = [[True] * 4, [True, False, True, False], [False] * 4, [False, True, True, True]]
    shapes = [(6, 8), (6, 8), (6, 8), (3, 8)]

    def made() -> list[SvdLayer]:
        return [random_layer(*shape, mask, seed) for seed, (shape, mask) in enumerate(zip(shapes, masks, strict=True))]

    together, alone = made(), made()
    rotate(together, total=4.0)
    for layer in alone:
        rotate([layer], total=4.0)
    for one, other in zip(together, alone, strict=True):
        for weight, same in zip(one.weights, other.weights, strict=True):
            torch.testing.assert_close(weight, same)


def test_rotating_again_changes_nothing() -> None:
    """The SVD leaves signs open: the current sign is kept, so the optimizer's averages still match."""
    layer = random_layer(9, 7, [True, False, True, True])
    rotate([layer], total=4.0)
    before = [weight.detach().clone() for weight in layer.weights]
    rotate([layer], total=4.0)
    for weight, old in zip(layer.weights, before, strict=True):
        torch.testing.assert_close(weight.detach(), old)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_layer_that_adds_nothing_or_no_number_is_left_alone(value: float) -> None:
    """For zeros or NaN an SVD would raise, or give arbitrary triplets."""
    odd, good = random_layer(6, 8, [True] * 3, 0), random_layer(6, 8, [True] * 3, 1)
    with torch.no_grad():
        odd.p.fill_(value)
    before = [weight.detach().clone() for weight in odd.weights]
    rotate([odd, good], total=3.0)
    for weight, old in zip(odd.weights, before, strict=True):
        assert torch.equal(weight.detach().nan_to_num(7.0), old.nan_to_num(7.0))
    assert float(good.lam.sum().detach()) == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_full(dtype: torch.dtype) -> None:
    """ΔW stays the same up to the precision of P, λ and Q."""
    layer = random_layer(6, 8, [True] * 3, dtype=dtype)
    before = added(layer)
    rotate([layer], total=3.0)
    assert layer.p.dtype == dtype
    torch.testing.assert_close(
        added(layer), before, rtol=0, atol=8 * torch.finfo(dtype).eps * float(before.abs().max())
    )


# --- In training ------------------------------------------------------------------------------------------------------


def test_each_allocation_leaves_the_svd_of_what_is_kept() -> None:
    """After each allocation, including the last, columns of P are orthogonal and λ adds up to the initial rank."""
    model, optimizer = started()
    tuner = tunerkit.tuner(model)
    seen = 0
    for _ in range(TOTAL):
        step(model, optimizer)
        if tuner.history and tuner.history[-1].step == tuner.steps:
            seen += 1
            for layer in layers(model):
                if layer.rank:
                    rows = layer.q.detach()[layer.mask]
                    gram = rows @ rows.T / rows.square().sum(1).mean()
                    torch.testing.assert_close(gram, torch.eye(layer.rank), rtol=0, atol=1e-4)
                    columns = layer.p.detach()[:, layer.mask]
                    gram = columns.T @ columns / columns.square().sum(0).mean()
                    torch.testing.assert_close(gram, torch.eye(layer.rank), rtol=0, atol=1e-3)
                    assert float(layer.lam.sum().detach()) == pytest.approx(SETTINGS["init_rank"], rel=1e-4)
    assert seen == 4


def test_the_output_is_the_same_before_and_after_a_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation changes the output only by the triplets that it masks."""
    from tunerkit_adalora import allocator as steps

    model, optimizer = started()
    outputs: list[Tensor] = []

    def rotating(found: list[SvdLayer], scores: list[Tensor], *, total: float) -> None:
        outputs.append(model(X).detach())
        to_svd_form_(found, scores, total=total)
        torch.testing.assert_close(model(X).detach(), outputs[-1], rtol=1e-5, atol=1e-6)

    monkeypatch.setattr(steps, "to_svd_form_", rotating)
    train(model, optimizer, TOTAL)
    assert len(outputs) == 4


def test_averages_restart_with_the_triplets() -> None:
    """The old averages belong to other triplets: after the next step, Ī is (1 − β1) I of that step alone."""
    model, optimizer = started()
    tuner = tunerkit.tuner(model)
    for _ in range(6):  # the sixth: an allocation
        step(model, optimizer)
    held = [average.clone() for average in training_of(tuner).averages[0]]
    step(model, optimizer)
    for weight, old, average in zip(weights_of(layers(model)), held, training_of(tuner).averages[0], strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(average, 0.15 * (weight * weight.grad).abs())
        assert not torch.equal(average, old)
    step(model, optimizer)
    for weight, average in zip(weights_of(layers(model)), training_of(tuner).averages[0], strict=True):
        assert weight.grad is not None
        assert (average > 0.15 * (weight * weight.grad).abs() + 1e-12).any()


def test_finishing_right_after_an_allocation_takes_its_scores() -> None:
    """Without new gradients, `finish` uses the scores from before the rotation: the smallest triplets are pruned."""
    model, optimizer = started()
    tuner = tunerkit.tuner(model)
    for _ in range(9):
        step(model, optimizer)
    before = tuner.ranks()
    sizes = [(layer.lam * layer.p.norm(dim=0) * layer.q.norm(dim=1)).detach() for layer in layers(model)]
    tuner.finish()
    after = tuner.ranks()
    assert all(after[path] <= rank for path, rank in before.items())
    for layer, size in zip(layers(model), sizes, strict=True):
        assert torch.equal(layer.mask, size >= size.sort(descending=True).values[layer.rank - 1]) or not layer.rank


def test_a_layer_without_gradients_since_an_allocation_keeps_its_scores() -> None:
    """A layer that is dropped for a while keeps its averages, and with them its rank."""
    model, optimizer = started(t_final=4)
    tuner = tunerkit.tuner(model)
    for _ in range(9):
        step(model, optimizer)
    path, layer = TARGETS[1], layers(model)[1]
    rank = tuner.ranks()[path]
    assert rank
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        for weight in layer.weights:
            weight.grad = None
        optimizer.step()
    assert tuner.history[-1].step == 12
    assert tuner.ranks()[path] > 0


@pytest.mark.parametrize("odd", ["frozen", "shared", "parametrised"])
def test_weights_that_are_not_the_layer_s_own_are_left_alone(odd: str) -> None:
    """Frozen weights must not change, shared ones belong to another module too, and computed ones cannot be written."""
    one, other = (random_layer(6, 8, [True] * 3, seed) for seed in (0, 1))
    if odd == "frozen":
        one.q.requires_grad_(False)
    elif odd == "shared":
        one.q = other.q
    else:
        nn.utils.parametrizations.weight_norm(one, "q")
    before = [weight.detach().clone() for weight in one.weights]
    rotate([one, other], total=3.0)
    for weight, old in zip(one.weights, before, strict=True):
        assert torch.equal(weight.detach(), old)


def test_autocast_rounds_nothing() -> None:
    """ΔW stays the same to fp32 although autocast would run every product in bf16."""
    layer = random_layer(60, 80, [True] * 4, dtype=torch.float32)
    before = added(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotate([layer], total=4.0)
    torch.testing.assert_close(added(layer), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_layers_of_several_ranks_and_dtypes_are_rotated_in_one_call() -> None:
    """The result equals that of each layer alone, in its own dtype."""
    made = [
        [random_layer(6, 8, [True] * rank, rank, dtype) for rank in (2, 4) for dtype in (torch.float32, torch.float64)]
        for _ in range(2)
    ]
    rotate(made[0], total=4.0)
    for one, other in zip(*made, strict=True):
        rotate([other], total=4.0)
        for weight, same in zip(one.weights, other.weights, strict=True):
            torch.testing.assert_close(weight, same)


def test_the_largest_takes_the_place_of_the_most_important() -> None:
    """Averages stay in place, so those of a position go to the triplet most like its old one."""
    layer = random_layer(9, 7, [True, True, False, True])
    to_svd_form_([layer], [torch.tensor([1.0, 3.0, 9.0, 2.0])], total=4.0)
    assert layer.lam.argsort(descending=True).tolist() == [1, 3, 0, 2]


def test_an_optimizer_with_averaged_weights_triggers_a_warning_and_nothing_is_rotated() -> None:
    """ASGD's averaged weights would mix triplets from before and after a rotation."""
    model, optimizer = started(torch.optim.ASGD)
    with pytest.warns(
        tunerkit.TunerkitWarning, match=r"keeps copies of the weights \(ax\).*exact_svd=False, train_lambda=False"
    ):
        train(model, optimizer, TOTAL)
    plain, its = started(torch.optim.ASGD, exact_svd=False, train_lambda=False, alpha=4.0)
    train(plain, its, TOTAL)
    for one, other in zip(weights(model), weights(plain), strict=True):
        assert torch.equal(one, other)


def test_timms_lookahead_around_the_attached_optimizer_triggers_a_warning() -> None:
    """It keeps its slow weights in the state of the inner optimizer."""
    optim = pytest.importorskip("timm.optim")
    model, optimizer = started(torch.optim.AdamW)
    slow = optim.Lookahead(optimizer, k=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(model, slow, TOTAL)
    assert any("keeps copies of the weights (lookahead_slow_buff)" in str(each.message) for each in told)


def test_without_it_an_allocation_moves_only_lambda() -> None:
    """With `exact_svd=False`, P and Q are unchanged, as in the paper."""
    model, optimizer = started(torch.optim.SGD, exact_svd=False)
    for _ in range(5):
        step(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    step(model, optimizer)
    assert tunerkit.tuner(model).history
    same = [torch.equal(weight, old) for weight, old in zip(weights(model), before, strict=True)]
    assert all(same[0::3])
    assert all(same[2::3])
    assert not all(same[1::3])


# --- Where it is in force ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_rank": 1}, True),
        ({"target_rank": 1, "gamma": 0.1}, False),
        ({"target_rank": 1, "start": "gaussian"}, False),
        ({"target_rank": 1, "start": "orthonormal"}, False),
        ({"start": "gaussian", "exact_svd": True}, True),
        ({"target_rank": 1, "exact_svd": False}, False),
    ],
)
def test_it_takes_the_penalty_s_place(config: dict[str, Any], expected: bool) -> None:
    """It is the default unless the paper's orthogonality penalty was requested."""
    assert AdaLoraConfig(**config).in_svd_form is expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, False),
        ({"target_rank": 3}, True),
        ({"target_rank": 4}, False),
        ({"target_rank": 4, "init_rank": 8}, False),
        ({"target_rank": 4, "init_rank": 9}, True),
        ({"target_rank": 1, "init_rank": 2}, False),
        ({"budget": 30, "init_rank": 12}, False),
        ({"exact_svd": True}, True),
    ],
)
def test_it_is_the_default_where_most_triplets_go(config: dict[str, Any], expected: bool) -> None:
    """The default is on if `target_rank` prunes over half of the triplets; a total budget does not count."""
    assert AdaLoraConfig(**config).in_svd_form is expected


def test_the_named_settings_are_without_it() -> None:
    """The presets of the paper and of PEFT keep the triplets as the optimizer leaves them."""
    assert not AdaLoraConfig.paper().in_svd_form
    assert not AdaLoraConfig.peft().in_svd_form


def test_it_cannot_go_with_the_penalty() -> None:
    """One error says which settings conflict."""
    with pytest.raises(tunerkit.errors.ConfigError, match=r"gamma 0\.1 pulls P and Q to length 1"):
        AdaLoraConfig(exact_svd=True, gamma=0.1)


@pytest.mark.parametrize(
    ("config", "initial", "scale"),
    [
        ({"target_rank": 1}, 8, 2 / 8),
        ({"target_rank": 3}, 8, 6 / 8),
        ({"target_rank": 4}, 6, 8 / 6),
        ({}, 12, 16 / 12),
        ({"init_rank": 20}, 20, 16 / 20),
        ({"exact_svd": True}, 12, 16 / 12),
        ({"target_rank": 1, "exact_svd": False}, 2, 4 / 3),
        ({"target_rank": 1, "init_rank": 12, "exact_svd": False}, 12, 4 / 3),
        ({"budget": 30, "init_rank": 12}, 12, 4 / 3),
        ({"budget": 30, "init_rank": 12, "exact_svd": True}, 12, 16 / 12),
        ({"target_rank": 2, "init_rank": 5, "alpha": 3.0}, 5, 3 / 5),
    ],
)
def test_rank_and_scale_follow_from_the_rank_at_the_end(config: dict[str, Any], initial: int, scale: float) -> None:
    """Together, all triplets have LoRA's scale of the target rank.

    Without SVD form, each has at least two thirds of LoRA's, however many start.
    """
    found = AdaLoraConfig(**config)
    assert found.initial_rank == initial
    assert found.scale == pytest.approx(scale)
