"""Trainings in which something that a forward read is replaced before it is read again, or before backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_testing.product_forms import fused_form, plain_form

SHAPES = ((64, 1024), (4, 256))
DTYPES = (torch.float32, torch.float64)


def agree(method: str, config: dict[str, object], scenario: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Check that a scenario ends in the fused form as in the plain one, for adapters that are not at their start."""
    torch.manual_seed(0)
    rows, width = shape
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8)).to(dtype)
    tunerkit.wrap(model, method, {**config, "targets": ["0", "2"], "adapter_dtype": dtype}, seed=0)
    for parameter in _trained(model):
        nn.init.normal_(parameter, std=0.05)
    x, slope = torch.randn(rows, width, dtype=dtype), torch.randn(rows, 8, dtype=dtype)
    with fused_form():
        found = SCENARIOS[scenario](model, x.clone(), slope)
    with plain_form():
        expected = SCENARIOS[scenario](model, x.clone(), slope)
    for own, other in zip(found, expected, strict=True):
        atol = 400 * torch.finfo(dtype).eps * float(other.abs().max())
        torch.testing.assert_close(own, other, rtol=0, atol=atol)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def descend(model: nn.Module, x: Tensor, slope: Tensor) -> list[Tensor]:
    """Projected gradient descent: the input stays one tensor, whose data is replaced while the last loss lives."""
    start = x.clone()
    x.requires_grad_()
    losses = []
    for _ in range(3):
        losses.append((model(x) * slope).mean())
        (gradient,) = torch.autograd.grad(losses[-1], x)
        # Not its sign, which flips where the two forms round a small gradient to either side of 0.
        x.data = start + (x - start + 0.05 * gradient / gradient.abs().max()).clamp(-0.1, 0.1).detach()
    return [x.detach(), *(loss.detach() for loss in losses)]


def truncate(model: nn.Module, x: Tensor, slope: Tensor) -> list[Tensor]:
    """Truncated backpropagation: between two reads of one tensor, it is detached in place."""
    hidden, trained = x.requires_grad_() * 2, _trained(model)
    first = (model(hidden).square() * slope).mean()
    before = torch.autograd.grad(first, [x, *trained])
    hidden.detach_().requires_grad_()
    after = torch.autograd.grad((model(hidden).square() * slope).mean(), [hidden, *trained])
    return [first.detach(), *before, *after]


def average(model: nn.Module, x: Tensor, slope: Tensor) -> list[Tensor]:
    """An average of the adapter's weights is swapped in between forward and backward, and out again."""
    loss, trained = (model(x.requires_grad_()).square() * slope).mean(), _trained(model)
    values = [parameter.data for parameter in trained]
    for parameter in trained:
        parameter.data = 0.5 * parameter.data + 0.1
    gradients = torch.autograd.grad(loss, [x, *trained])
    for parameter, value in zip(trained, values, strict=True):
        parameter.data = value
    return [*gradients]


def merge(model: nn.Module, x: Tensor, slope: Tensor) -> list[Tensor]:
    """The adapter is merged between forward and backward."""
    loss = (model(x.requires_grad_()).square() * slope).mean()
    tunerkit.merge(model)
    gradients = torch.autograd.grad(loss, [x, *_trained(model)])
    tunerkit.unmerge(model)
    return [*gradients]


SCENARIOS: dict[str, Callable[[nn.Module, Tensor, Tensor], list[Tensor]]] = {
    "projected gradient descent": descend,
    "truncated backpropagation": truncate,
    "an average swapped in": average,
    "a merge before backward": merge,
}
