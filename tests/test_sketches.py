"""Statistics in bounded memory: exact up to the rank that was asked for, near the best approximation above it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunerkit.layers import BaseLayer, Sketch, as_base_layer
from tunerkit.records import Statistics, StatisticsRequest

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


def measured(layer: nn.Module, x: Tensor, request: StatisticsRequest, parts: int = 2) -> tuple[Statistics, Tensor]:
    """The statistics over some batches of a sum of squared outputs, and the exact gradient by W, (out, in)."""
    base = as_base_layer(layer)
    assert base is not None
    sketch = Sketch(base, request, torch.Generator().manual_seed(0))
    handle = layer.register_forward_hook(sketch.hook, with_kwargs=True)
    for batch in x.chunk(parts):
        value = layer(batch).square().sum()
        probes: list[Any] = [probe for probe in (sketch.p, sketch.q) if probe is not None]
        for probe, grad in zip(probes, torch.autograd.grad(value, probes) if probes else (), strict=True):
            probe.grad = grad if probe.grad is None else probe.grad + grad
    handle.remove()
    (exact,) = torch.autograd.grad(layer(x).square().sum(), [layer.get_parameter("weight")])
    return sketch.statistics(), unpacked(base, exact)


def unpacked(base: BaseLayer, gradient: Tensor) -> Tensor:
    """A tensor in the layout of the weight as a matrix (out, in)."""
    return gradient.T if isinstance(base.module, nn.Embedding) else gradient.flatten(1)


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


def sizes(sketch: Sketch) -> int:
    """The values that a sketch holds, gradients included."""
    tensors = [value for value in vars(sketch).values() if isinstance(value, Tensor)]
    grads = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum(tensor.numel() for tensor in (*tensors, *grads))


@pytest.mark.parametrize("build", LAYERS)
def test_memory_does_not_depend_on_the_amount_of_data(build: Build) -> None:
    """After one batch and after fifty, a sketch holds equally many values, and no list grows."""
    layer, x, _ = build(5)
    base = as_base_layer(layer)
    assert base is not None
    held: list[Any] = []
    for count in (1, 50):
        sketch = Sketch(base, StatisticsRequest(inputs=3, gradients=3), torch.Generator().manual_seed(0))
        handle = layer.register_forward_hook(sketch.hook, with_kwargs=True)
        for _ in range(count):
            probes = [sketch.p, sketch.q]
            for probe, grad in zip(probes, torch.autograd.grad(layer(x).sum(), probes), strict=True):  # type: ignore[arg-type]
                assert probe is not None
                probe.grad = grad if probe.grad is None else probe.grad + grad
        handle.remove()
        held.append((sizes(sketch), vars(sketch).keys()))
    assert held[0] == held[1]


@pytest.mark.parametrize("build", LAYERS)
def test_the_layers_output_does_not_change(build: Build) -> None:
    """The probes are 0, so every bit of a finite output stays."""
    layer, x, _ = build(5)
    before = layer(x)
    base = as_base_layer(layer)
    assert base is not None
    sketch = Sketch(base, StatisticsRequest(inputs=3, gradients=3), torch.Generator().manual_seed(0))
    handle = layer.register_forward_hook(sketch.hook, with_kwargs=True)
    assert torch.equal(layer(x), before)
    handle.remove()


def test_a_layer_in_bfloat16_is_measured_in_fp32() -> None:
    """Sums over many rows would lose small terms otherwise."""
    torch.manual_seed(0)
    layer, x, _ = linear(3)
    rows = x.bfloat16().reshape(-1, IN).float()
    found, _ = measured(layer.bfloat16(), x.bfloat16(), StatisticsRequest(inputs=IN))
    assert found.inputs is not None
    assert found.inputs.dtype == torch.float32
    assert relative(found.inputs.T @ found.inputs, rows.T @ rows) <= 1e-5
