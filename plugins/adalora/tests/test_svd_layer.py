"""The SVD layer's gradients: those of what a forward read, also once triplets are masked or removed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import tunerkit
from tests.support import between
from tunerkit_testing.product_forms import fused_form, plain_form
from tunerkit_testing.small import trainable


@pytest.mark.parametrize("shape", between.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", between.DTYPES, ids=str)
@pytest.mark.parametrize("scenario", between.SCENARIOS)
def test_what_is_replaced_between_two_reads_ends_as_in_the_plain_form(
    scenario: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Nothing of an input or a weight is remembered from one read to the next."""
    between.agree("adalora", {}, scenario, shape, dtype)


def test_gradients_after_an_allocation_are_those_of_the_plain_form() -> None:
    """Triplets were removed by then, and ranks differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    config = {"targets": ["0", "2"], "init_rank": 4, "target_rank": 2, "t_init": 0.1, "t_final": 0.3, "delta_t": 1}
    tunerkit.wrap(model, "adalora", {**config, "adapter_dtype": torch.float64}, seed=0)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-1)
    tunerkit.attach(model, optimizer, total_steps=8)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for _ in range(8):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(tunerkit.tuner(model).ranks().values()) == 4

    def gradients() -> list[Tensor]:
        loss = model(x).square().sum()
        return [*torch.autograd.grad(loss, [x, *trainable(model)], materialize_grads=True)]

    with fused_form():
        found = gradients()
    with plain_form():
        expected = gradients()
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-13)


def test_a_weight_that_torch_prunes_is_read_where_torch_keeps_it() -> None:
    """`torch.nn.utils.prune` renames a parameter, and keeps as many as before."""
    model, x = tunerkit.wrap(nn.Sequential(nn.Linear(8, 8)), "adalora", {"targets": ["0"]}, seed=0), torch.randn(3, 8)
    (adapter,) = tunerkit.tuner(model).adapters().values()
    prune.l1_unstructured(adapter, "p", 0.3)  # type: ignore[no-untyped-call]
    assert torch.equal(model(x), model(x))
