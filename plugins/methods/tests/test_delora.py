"""DeLoRA bounds what it adds, and refuses a rank above the matrix."""

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import TargetError
from tunerkit_methods.delora import Bounded


def test_bounds_each_triplet_however_long_a_and_b_are() -> None:
    """Without the norms of W, ΔW is at most λ long, and each triplet λ/r."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(12, 20)), "delora", {"rank": 3, "bound": 2.0, "targets": ["0"]})
    adapter = tunerkit.tuner(model).adapters()["0"]
    assert isinstance(adapter, Bounded)
    with torch.no_grad():
        adapter.norms.fill_(1.0)
        for factor in (1e-2, 1e3):
            adapter.a.normal_().mul_(factor)
            adapter.b.normal_().mul_(factor)
            q, p = adapter.product()
            assert torch.linalg.matrix_norm(p @ q) <= 2.0 * (1 + 1e-5)
            lengths = [torch.linalg.matrix_norm(torch.outer(p[:, i], q[i])) for i in range(3)]
            torch.testing.assert_close(torch.stack(lengths), torch.full((3,), 2.0 / 3))


@pytest.mark.parametrize("method", ["delora", "lora-fa"])
def test_a_rank_above_the_matrix_is_refused(method: str) -> None:
    """One line says what fits; the default works on any layer."""
    with pytest.raises(TargetError, match="rank is 13, and at most 12 fits"):
        tunerkit.wrap(nn.Sequential(nn.Linear(12, 20)), method, {"rank": 13, "targets": ["0"]})
    tunerkit.wrap(nn.Sequential(nn.Linear(3, 2)), method, {"targets": ["0"]})
