"""AdaLoRA on stacks of matrices, such as experts, beside the same matrices as separate layers."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import tunerkit
from plugins.adalora.tests import toy_experts
from plugins.adalora.tests.short_training import TOTAL, assert_same_weights, layers
from plugins.adalora.tests.toy_experts import EXPERTS, separate, stacked
from tests.support.toys import group_of_one as group_of_one, registering
from tunerkit.plugin import Factors
from tunerkit_adalora.allocator import allocate
from tunerkit_adalora.importance import new_averages, smooth_, stacks_of, triplet_scores, unstack
from tunerkit_adalora.svd_layer import SvdLayer, layer_of
from tunerkit_adalora.training import training_of
from tunerkit_testing.counting import Counting
from tunerkit_testing.small import trainable

_plugin = registering(toy_experts.Plugin())

SETTINGS: dict[str, Any] = {
    "target_rank": 2, "init_rank": 4, "t_init": 4, "t_final": 6, "delta_t": 3, "adapter_dtype": "float64",
    "exact_svd": False, "train_lambda": True, "alpha": 8.0, "targets": ["*"],
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "ranks": {},
    "parameters": {"budget_unit": "parameters"},
    "fixed λ": {"train_lambda": False},
    "SVD form": {"exact_svd": True, "train_lambda": False},
    "λ from 0": {"start": "gaussian"},
    "bounds": {"min_rank": 1, "max_rank": 3},
    "a budget": {"target_rank": None, "budget": 9},
}
BATCHES = [
    (
        torch.randn(8, 6, generator=rng, dtype=torch.float64),
        # Expert 2 of the first layer gets no token in every third batch, expert 0 of the second only in the first.
        torch.stack([torch.randint(2 if number % 3 else 3, (8,), generator=rng),
                     torch.randint(min(number, 1), 3, (8,), generator=rng)]),
        torch.randn(8, 3, generator=rng, dtype=torch.float64),
    )
    for number in range(TOTAL)
    for rng in [torch.Generator().manual_seed(number)]
]  # fmt: skip


def wrapped(model: nn.Module, **changes: Any) -> nn.Module:
    return tunerkit.wrap(model, "adalora", {**SETTINGS, "shrink": False, **changes}, seed=0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """SGD leaves a weight with gradient 0 alone, as it does one without a gradient."""
    return torch.optim.SGD(trainable(model), lr=0.05)


def attached(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = sgd(model)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    x, ids, y = BATCHES[number]
    optimizer.zero_grad()
    mse_loss(model(x, ids), y).backward()
    optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: Sequence[int] = range(TOTAL)) -> None:
    for number in numbers:
        step(model, optimizer, number)


def matrices(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """P, λ, Q and the mask of each matrix, expert after expert."""
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for layer in layers(model):
        own = layer.p, layer.lam, layer.q, layer.mask
        found += zip(*own, strict=True) if layer.mask.ndim > 1 else [own]
    return found


def averages(model: nn.Module) -> list[Tensor]:
    """Ī and Ū of P, λ and Q of each matrix, in the order of `matrices`."""
    found: list[Tensor] = []
    every, training = layers(model), training_of(tunerkit.tuner(model))
    for kind in training.averages:
        for layer, *own in zip(every, kind[::3], kind[1::3], kind[2::3], strict=True) if kind else ():
            found += itertools.chain(*zip(*own, strict=True)) if layer.mask.ndim > 1 else own
    return found


def copy_start_(model: nn.Module, start: nn.Module) -> None:
    """Give each matrix of ``model`` the values of the same matrix of ``start``."""
    with torch.no_grad():
        for own, others in zip(matrices(model), matrices(start), strict=True):
            for weight, other in zip(own[:3], others[:3], strict=True):
                weight.copy_(other)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_stack_trains_as_a_layer_for_each_of_its_matrices(changes: dict[str, Any]) -> None:
    """At each step all masks are equal, and weights and averages within 1e-9. The live triplets spend the budget."""
    model, other = wrapped(stacked(), **changes), wrapped(separate(), **changes)
    copy_start_(model, other)
    optimizers = attached(model), attached(other)
    assert len(matrices(model)) == len(layers(other)) == 2 * EXPERTS + 1
    masks = set()
    for number in range(TOTAL):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            step(each, optimizer, number)
        for (*own, mask), (*others, expected) in zip(matrices(model), matrices(other), strict=True):
            assert torch.equal(mask, expected), number
            assert all((a - b).abs().max() < 1e-9 for a, b in zip(own, others, strict=True)), number
        pairs = zip(averages(model), averages(other), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-15) for a, b in pairs), number
        masks.add(str([mask.tolist() for *_, mask in matrices(model)]))
    tuner, separately = tunerkit.tuner(model), tunerkit.tuner(other)
    assert len(masks) > 2
    assert [change.budget for change in tuner.history] == [change.budget for change in separately.history]
    assert tuner.budget() == separately.budget()
    if changes.get("budget_unit", "rank") == "rank":
        # With a fixed λ, those that are 0 are not kept; here none is.
        assert all(sum(change.ranks.values()) == change.budget for change in tuner.history)
    assert tuner.ranks().keys() == {"one.stack", "middle", "two.stack"}


def test_an_expert_without_tokens_keeps_its_averages() -> None:
    """Autograd gives it gradients of 0, which are not averaged; the averages of other experts change."""
    model = wrapped(stacked())
    optimizer = attached(model)
    train(model, optimizer, range(3))
    before = [average.clone() for average in averages(model)]
    x, ids, y = BATCHES[0]
    optimizer.zero_grad()
    mse_loss(model(x, ids.clamp(max=1)), y).backward()
    layer = layers(model)[0]
    assert layer.p.grad is not None
    assert not layer.p.grad[2].any()
    optimizer.step()
    same = [bool(torch.equal(a, b)) for a, b in zip(averages(model), before, strict=True)]
    of_matrices = [all(same[at : at + 3]) for at in range(0, len(same), 3)]
    assert of_matrices == [False, False, True, False, False, False, True] * 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_of_one_expert_leaves_out_its_matrix_alone(bad: float) -> None:
    """P of expert 1 keeps its averages and is counted; all other matrices are averaged."""
    weights = [torch.ones(2, 5, 3), torch.ones(2, 3), torch.ones(2, 3, 70)] * 2
    grads = [torch.ones_like(weight) for weight in weights]
    grads[3][1, 4, 2] = bad
    flat = new_averages(weights)
    assert smooth_(weights, grads, flat, beta1=0.85, beta2=0.85) == 1
    found = {
        (index, number): bool(matrix.all())
        for index, average in enumerate(unstack(stacks_of(flat))[0])
        for number, matrix in enumerate(average)
    }
    assert [at for at, averaged in found.items() if not averaged] == [(3, 1)]
    assert all(score.isfinite().all() and score.shape == (2, 3) for score in triplet_scores(stacks_of(flat)))


def test_a_step_takes_as_many_operations_for_many_experts_as_for_few() -> None:
    """Also for many stacks; an allocation takes as many for any number of experts."""

    def dispatched(experts: int, depth: int) -> tuple[int, int]:
        weights = [torch.ones(experts, *s) for _ in range(depth) for s in ((4, 3), (3,), (3, 5))]
        flat = new_averages(weights)
        with Counting() as step:
            smooth_(weights, weights, flat, beta1=0.85, beta2=0.7)
        with Counting() as allocation:
            allocate(triplet_scores(stacks_of(flat)), 4)
        return step.count, allocation.count

    assert dispatched(2, 1) == dispatched(40, 1)
    assert dispatched(2, 1)[0] == dispatched(2, 20)[0]


def test_bounds_and_ties_are_of_each_matrix_of_a_stack() -> None:
    """The earlier matrix wins a tie; each gets its minimum, and none more than its maximum."""
    scores = [torch.ones(2, 3), torch.full((3,), 2.0)]
    expected = [[[True, True, True], [True, False, False]], [True, True, True]]
    assert [mask.tolist() for mask in allocate(scores, 7)] == expected
    bounded = allocate(scores, 6, minimum=[1, 0], maximum=[2, 3])
    assert [mask.tolist() for mask in bounded] == [[[True, True, False], [True, False, False]], [True, True, True]]
    # A triplet of the stack costs twice as much.
    dear = allocate(scores, 7, costs=[2, 1])
    assert [mask.tolist() for mask in dear] == [[[True, True, False], [False, False, False]], [True, True, True]]


def test_files_and_merging_keep_every_bit(tmp_path: Path) -> None:
    """A saved adapter loads with its masks; merging gives the same output, and unmerging restores the weights."""
    model = wrapped(stacked())
    train(model, attached(model))
    x, ids, _ = BATCHES[0]
    adapted, before = model(x, ids), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = tunerkit.load(stacked(), tunerkit.save(model, tmp_path))
    assert_same_weights(loaded, model)
    assert torch.equal(loaded(x, ids), adapted)
    tunerkit.merge(model)
    assert (model(x, ids) - adapted).abs().max() < 1e-12
    assert not torch.equal(model.get_parameter("one.w"), before["one.w"])
    tunerkit.unmerge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with tunerkit.disabled(model):
        assert torch.equal(model(x, ids), stacked()(x, ids))


@pytest.mark.parametrize("at", [2, 6, 11, 15])
@pytest.mark.parametrize("changes", [{}, {"exact_svd": True, "train_lambda": False}], ids=["plain", "SVD form"])
def test_a_resumed_training_equals_the_whole_one_to_the_bit(at: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Masks (E, r) and averages are restored, before, between and after allocations."""
    model = wrapped(stacked(), **changes)
    optimizer = attached(model)
    train(model, optimizer, range(at))
    path = tunerkit.save(model, tmp_path)
    tunerkit.save_state(model, tmp_path)
    again = tunerkit.load(stacked(), path, trainable=True)
    fresh = sgd(again)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tunerkit.attach(again, fresh, total_steps=TOTAL)
    tunerkit.load_state(again, tmp_path)
    assert_same_weights(again, model)
    for each, own in ((model, optimizer), (again, fresh)):
        train(each, own, range(at, TOTAL))
    assert_same_weights(again, model)
    assert tunerkit.tuner(again).ranks() == tunerkit.tuner(model).ranks()


def test_the_final_allocation_keeps_masks_and_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    """No layer of the adapter shrinks, and the masks are applied after each further step."""
    model = wrapped(stacked(), shrink=True)
    train(model, attached(model))
    told = [str(each.message) for each in recwarn if "masked triplets stay in memory" in str(each.message)]
    assert len(told) == 1
    assert "stacks of experts" in told[0]
    assert [layer.lam.shape[-1] for layer in layers(model)] == [4, 4, 4]
    assert tunerkit.tuner(model).budget() == sum(layer.rank for layer in layers(model)) == 2 * (2 * EXPERTS + 1)
    assert all(not layer.lam[~layer.mask].any() for layer in layers(model))


def test_a_stack_without_dead_triplets_ends_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Nothing is pruned, so nothing stays masked."""
    model = wrapped(stacked(), shrink=True, target_rank=4)
    train(model, attached(model))
    assert not [each for each in recwarn if "stay in memory" in str(each.message)]
    assert all(layer.mask.all() for layer in layers(model))


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [({"gamma": 0.1}, "set gamma to 0"), ({"start": "eva"}, "set start to 'lora'")],
    ids=["gamma", "eva"],
)
def test_what_a_stack_does_not_support_is_refused_when_wrapping(changes: dict[str, Any], way_out: str) -> None:
    """One error names the stacks and the way out; the model without them can be wrapped."""
    with pytest.raises(tunerkit.errors.TargetError, match=way_out) as error:
        wrapped(stacked(), **changes)
    assert "one.stack" in str(error.value)
    assert "two.stack" in str(error.value)
    assert layers(wrapped(stacked(), **changes, exclude=["one", "two"]))


@pytest.mark.usefixtures("group_of_one")
def test_sharded_stacks_are_refused_when_attaching() -> None:
    """The error names one of them; an adapter of other layers is sharded as before."""
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP")
    pytest.importorskip("tunerkit_distributed", reason="it knows FSDP")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for targets in (["*"], ["middle"]):
        model = fsdp.fully_shard(wrapped(stacked(), targets=targets), mesh=mesh)
        if targets == ["*"]:
            with pytest.raises(tunerkit.errors.StepError, match=r"shards of stacks .* 'one\.stack': train with DDP"):
                attached(model)
        else:
            train(model, attached(model))
            assert tunerkit.tuner(model).budget() == 2


@pytest.mark.parametrize("start", ["lora", "gaussian", "orthonormal"])
def test_each_matrix_of_a_stack_starts_as_that_of_a_layer(start: str) -> None:
    """Its values have the same bound or length, and are its own draws; a layer's are those of before."""
    torch.manual_seed(0)
    stack = SvdLayer(in_features=7, out_features=5, rank=3, scale=1.0, dropout=0.0, start=start, stack=400)
    layer = SvdLayer(in_features=7, out_features=5, rank=3, scale=1.0, dropout=0.0, start=start)
    assert [weight.shape[1:] for weight in stack.weights] == [weight.shape for weight in layer.weights]
    assert not torch.equal(stack.q[0], stack.q[1])
    if start == "orthonormal":
        assert torch.allclose(stack.q @ stack.q.mT, torch.eye(3).expand(400, 3, 3), atol=1e-5)
        assert torch.allclose(stack.p.mT @ stack.p, torch.eye(3).expand(400, 3, 3), atol=1e-5)
    else:
        bound = 7**-0.5 if start == "lora" else 0.02 * 3**0.5
        assert stack.q.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_a_stack_is_built_from_products_and_gives_them_back() -> None:
    """Columns that are dead in every matrix are left out; the product stays."""
    generator = torch.Generator().manual_seed(0)
    product = Factors(q=torch.randn(4, 3, 6, generator=generator), p=torch.randn(4, 5, 3, generator=generator))
    layer = layer_of(product)
    assert [weight.shape for weight in layer.weights] == [(4, 5, 3), (4, 3), (4, 3, 6)]
    assert layer.rank == 12
    found = layer.factors()
    assert torch.allclose(found.p @ found.q, product.p @ product.q, atol=1e-5)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[:, 2] = False
    mask[1, 1] = False
    layer.mask = mask
    with torch.no_grad():
        layer.lam.mul_(mask)
    assert layer.rank == 7
    assert layer.factors().rank == 2
    found = layer.factors()
    assert torch.allclose(found.p @ found.q, layer.p * layer.lam.unsqueeze(1) @ layer.q, atol=1e-5)
