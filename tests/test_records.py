"""The records that tunerkit and its plugins exchange."""

import torch
from torch import Tensor

from tunerkit import Factors


def test_a_forward_may_build_factors_under_compile() -> None:
    """A method's forward can share the function that `tunerkit_factors` calls."""

    def product(q: Tensor, p: Tensor, x: Tensor) -> Tensor:
        factors = Factors(q=2 * q, p=p)
        return x @ factors.q.T @ factors.p.T

    q, p, x = torch.randn(2, 4), torch.randn(3, 2), torch.randn(5, 4)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, p, x), product(q, p, x))


def test_the_rank_of_factors_is_that_of_their_shapes() -> None:
    """It may be 0."""
    assert [Factors(q=torch.empty(r, 4), p=torch.empty(3, r)).rank for r in (0, 2)] == [0, 2]
