"""A training of twenty steps that prunes a small model, shared by several test files."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_adalora.svd_layer import SvdLayer
from tunerkit_testing.small import TARGETS, net, trainable

TOTAL = 20
# b(0) = 12 until step 4, allocations at 6, 9, 12 and 14, where the final phase with b(T) = 6 begins. Dead triplets stay
# in memory, so tests can inspect the masks; test_shrinking.py removes them.
SETTINGS: dict[str, Any] = {
    "target_rank": 2, "init_rank": 4, "t_init": 4, "t_final": 6, "delta_t": 3, "shrink": False, "targets": TARGETS
}  # fmt: skip


def wrapped(model: nn.Module | None = None, *, seed: int = 0, **changes: Any) -> nn.Module:
    """``model``, or `net`, with AdaLoRA; ``changes`` override `SETTINGS`."""
    return tunerkit.wrap(net() if model is None else model, "adalora", {**SETTINGS, **changes}, seed=seed)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW for all trained parameters of ``model``."""
    return torch.optim.AdamW(trainable(model), lr=2e-2, **options)


def attached(
    model: nn.Module, total_steps: int = TOTAL, *, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
) -> torch.optim.Optimizer:
    """The optimizer to which ``model`` is attached; ``make`` builds it."""
    optimizer = make(trainable(model), lr=2e-2)
    tunerkit.attach(model, optimizer, total_steps=total_steps)
    return optimizer


def layers(model: nn.Module) -> list[SvdLayer]:
    """The SVD layers, in the order of the targets."""
    return [layer for layer in tunerkit.tuner(model).adapters().values() if isinstance(layer, SvdLayer)]


def live(model: nn.Module) -> int:
    """The live triplets of all SVD layers together."""
    return sum(int(layer.mask.sum()) for layer in layers(model))


def masked_lambdas(model: nn.Module) -> Tensor:
    """λ of the triplets that are not live."""
    return torch.cat([layer.lam.detach()[~layer.mask] for layer in layers(model)])


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of P, λ, Q and the mask of each SVD layer."""
    return [w.detach().clone() for layer in layers(model) for w in (layer.p, layer.lam, layer.q, layer.mask)]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """`weights` are the same bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
