"""Statistics in bounded memory: exact up to the rank that was asked for, near the best approximation above it."""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import AdapterError, PluginError
from tunerkit.plugin import Method, Statistics, StatisticsRequest
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

IN = 12


def linear(rank: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, inputs (n, ...) and the same inputs as rows of W's argument, (n, in), that span ``rank`` dimensions."""
    rows = torch.randn(40, rank) @ torch.randn(rank, IN)
    return nn.Linear(IN, 7), rows.reshape(8, 5, IN), rows


def convolution(rank: int) -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.Conv2d(3, 7, 2, stride=2)
    patches = torch.randn(40, rank) @ torch.randn(rank, IN)
    images = nn.functional.fold(patches.reshape(10, 4, IN).transpose(1, 2), (4, 4), 2, stride=2)
    return layer, images, patches


def embedding(rank: int) -> tuple[nn.Module, Tensor, Tensor]:
    ids = torch.randint(rank, (10, 4))
    return nn.Embedding(IN, 7), ids, nn.functional.one_hot(ids.flatten(), IN).float()


LAYERS = (linear, convolution, embedding)
Build = Callable[[int], tuple[nn.Module, Tensor, Tensor]]


class Keeping(LowRankPlugin):
    """Keeps the statistics that it wants."""

    def __init__(self, wanted: StatisticsRequest | Callable[[Any], StatisticsRequest | None]) -> None:
        self.wanted = wanted
        self.found: dict[str, Statistics] = {}

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-keeping", config=LowRankConfig, statistics=self.wanted)]

    @tunerkit.hookimpl
    def tunerkit_calibrate(self, statistics: Any) -> None:
        self.found.update(statistics)


def statistics(layer: nn.Module, batches: Iterable[Tensor], request: StatisticsRequest) -> Statistics:
    """What `tunerkit.calibrate` measures at a layer for a sum of squared outputs."""
    with registered(plugin := Keeping(request)):
        model = tunerkit.wrap(nn.Sequential(layer), "toy-keeping", {"targets": ["0"]})
        tunerkit.calibrate(model, batches, loss=lambda output, batch: output.square().sum())
        tunerkit.unwrap(model)
    return plugin.found["0"]


def measured(layer: nn.Module, x: Tensor, request: StatisticsRequest, parts: int = 2) -> tuple[Statistics, Tensor]:
    """The statistics over some batches, and the exact gradient by W, (out, in)."""
    found = statistics(layer, x.chunk(parts), request)
    (exact,) = torch.autograd.grad(layer(x).square().sum(), [layer.get_parameter("weight")])
    return found, unpacked(layer, exact)


def unpacked(layer: nn.Module, gradient: Tensor) -> Tensor:
    """A tensor in the layout of the weight as a matrix (out, in)."""
    return gradient.T if isinstance(layer, nn.Embedding) else gradient.flatten(1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - expected, 2) / torch.linalg.matrix_norm(expected, 2))


@pytest.mark.parametrize("build", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_second_moment_is_exact_up_to_its_rank(build: Build, rank: int) -> None:
    """SᵀS equals Σ x xᵀ over all rows, however the data is cut into batches."""
    torch.manual_seed(rank)
    layer, x, rows = build(rank)
    for parts in (1, 4):
        found, _ = measured(layer, x, StatisticsRequest(inputs=5), parts)
        assert found.gradients is None
        assert found.inputs is not None
        assert found.inputs.shape == (5, IN)
        assert found.rows == len(rows)
        assert relative(found.inputs.T @ found.inputs, rows.T @ rows) <= 1e-5


@pytest.mark.parametrize("build", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_centred_inputs_are_exact_up_to_their_rank(build: Build, rank: int) -> None:
    """Law: their rows are the principal components, and the variance is Σ ‖x − mean‖², however the data is cut."""
    torch.manual_seed(rank)
    layer, x, rows = build(rank)
    centred = rows - rows.mean(dim=0)
    for parts in (1, 4):
        found, _ = measured(layer, x, StatisticsRequest(inputs=5), parts)
        assert found.centred is not None
        size = torch.linalg.matrix_norm(rows, 2) ** 2  # equal rows differ from their mean by rounding alone
        assert found.variance == pytest.approx(float(centred.square().sum()), rel=1e-5, abs=1e-6 * float(size))
        error = torch.linalg.matrix_norm(found.centred.T @ found.centred - centred.T @ centred, 2)
        assert error <= 1e-6 * size
        lengths = found.centred.norm(dim=1)
        assert bool((lengths[:-1] >= lengths[1:]).all())


def test_each_group_of_a_convolution_has_rows_of_its_own() -> None:
    """Law: a patch of each group is a row, in the moment, the mean and their number."""
    torch.manual_seed(0)
    layer, x = nn.Conv1d(4, 6, 2, groups=2), torch.randn(3, 4, 5)
    found = statistics(layer, [x], StatisticsRequest(inputs=4))
    rows = x.unfold(2, 2, 1).unflatten(1, (2, 2)).permute(0, 1, 3, 2, 4).reshape(-1, 4)
    centred = rows - rows.mean(dim=0)
    assert found.inputs is not None
    assert found.centred is not None
    assert found.rows == len(rows)
    assert relative(found.inputs.T @ found.inputs, rows.T @ rows) <= 1e-5
    assert relative(found.centred.T @ found.centred, centred.T @ centred) <= 1e-4


def test_what_is_wanted_may_depend_on_the_settings() -> None:
    """Law: a function of the config is asked; None needs no data, and anything else is the plugin's mistake."""
    model = nn.Sequential(nn.Linear(IN, 4))
    x = torch.randn(5, IN)

    def wanted(config: LowRankConfig) -> StatisticsRequest | None:
        return {1: None, 2: StatisticsRequest(inputs=3), 3: "inputs"}[config.rank]  # type: ignore[return-value]

    with registered(plugin := Keeping(wanted)):
        for rank, error, words in ((1, AdapterError, "needs no data with its settings"), (3, PluginError, "'inputs'")):
            tunerkit.wrap(model, "toy-keeping", {"targets": ["0"], "rank": rank})
            with pytest.raises(error, match=words):
                tunerkit.calibrate(model, [x])
            tunerkit.unwrap(model)
        tunerkit.wrap(model, "toy-keeping", {"targets": ["0"], "rank": 2})
        tunerkit.calibrate(model, [x])
        tunerkit.unwrap(model)
    assert plugin.found["0"].rows == 5


@pytest.mark.parametrize("build", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_gradient_is_exact_up_to_its_rank(build: Build, rank: int) -> None:
    """P Q equals the gradient by W, summed over the batches: its rank is at most that of the inputs."""
    torch.manual_seed(rank)
    layer, x, rows = build(rank)
    for parts in (1, 4):
        found, exact = measured(layer, x, StatisticsRequest(gradients=5), parts)
        assert found.inputs is None
        assert found.gradients is not None
        assert (found.gradients.p.shape, found.gradients.q.shape) == ((7, 5), (5, IN))
        assert found.rows == len(rows)
        assert relative(found.gradients.p @ found.gradients.q, exact) <= 1e-4


def decaying(count: int, size: int) -> Tensor:
    """Rows whose second moment has the eigenvalues 1, 1/4, 1/16 ..., times ``count``."""
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    return torch.linalg.qr(torch.randn(count, size)).Q * count**0.5 @ torch.diag(0.5 ** torch.arange(size)) @ basis


def test_above_the_rank_the_error_is_near_that_of_the_best_approximation() -> None:
    """For a spectrum that decays, both are within 10 times the best approximation of the same rank (seeded)."""
    torch.manual_seed(0)
    rows, k = decaying(200, IN), 6
    layer = nn.Linear(IN, 9)
    found, exact = measured(layer, rows, StatisticsRequest(inputs=k, gradients=k))
    assert found.inputs is not None
    assert found.gradients is not None
    moment = rows.T @ rows
    best = torch.linalg.eigvalsh(moment).flip(0)[k]
    assert torch.linalg.matrix_norm(found.inputs.T @ found.inputs - moment, 2) <= 10 * best
    best = torch.linalg.svdvals(exact)[k]
    assert torch.linalg.matrix_norm(found.gradients.p @ found.gradients.q - exact, 2) <= 10 * best


def test_a_rank_above_the_layers_sizes_is_exact() -> None:
    """There is nothing to leave out."""
    torch.manual_seed(0)
    layer, x, rows = linear(IN)
    found, exact = measured(layer, x, StatisticsRequest(inputs=50, gradients=50))
    assert found.inputs is not None
    assert found.gradients is not None
    assert relative(found.inputs.T @ found.inputs, rows.T @ rows) <= 1e-5
    assert relative(found.gradients.p @ found.gradients.q, exact) <= 1e-4


@pytest.mark.parametrize("build", LAYERS)
def test_memory_does_not_depend_on_the_amount_of_data(build: Build) -> None:
    """From the second of fifty batches on, equally many values are alive."""
    layer, x, _ = build(5)
    alive: list[int] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(50):
            gc.collect()
            alive.append(sum(each.numel() for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)))
            yield x

    gc.freeze()  # the objects of all other tests, which are many, and take a second each time
    try:
        statistics(layer, batches(), StatisticsRequest(inputs=3, gradients=3))
    finally:
        gc.unfreeze()
    assert len(set(alive[2:])) == 1
