"""AdaLoRA at layers that read one input: the gradients of P, λ and Q are those of each layer alone."""

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.layers import fused, plain_form
from tunerkit_testing.small import trainable


class Attention(nn.Module):
    """q, k and v read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = (self.q(x) * self.k(x)).tanh().unflatten(-1, (2, 4)).sum(-2) + self.v(x)
        return mixed


@pytest.mark.parametrize("steps", [0, 8], ids=["at the start", "after an allocation"])
def test_gradients_in_a_group_are_those_of_the_plain_form(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any allocation, and once triplets are masked or removed and ranks differ."""
    for limit in ("LEAST_WIDTH", "LEAST_NUMBERS"):
        monkeypatch.setattr(fused, limit, 0)
    config = {"targets": ["q", "k", "v"], "init_rank": 4, "target_rank": 2, "t_init": 0.1, "t_final": 0.3, "delta_t": 1}
    model = tunerkit.wrap(Attention().double(), "adalora", {**config, "adapter_dtype": torch.float64}, seed=0)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-1)
    tunerkit.attach(model, optimizer, total_steps=8)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def gradients() -> list[Tensor]:
        return [*torch.autograd.grad(model(x).square().sum(), [x, *trainable(model)])]

    together = gradients()
    if steps == 0:
        assert tunerkit.tuner(model).groups() == {"groups of 3": 1}
    with plain_form():
        alone = gradients()
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
