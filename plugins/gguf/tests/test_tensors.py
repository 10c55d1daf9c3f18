"""The arithmetic between tunerkit's products and llama.cpp's pairs."""

import torch
from hypothesis import given, strategies as st

from tunerkit.plugin import Factors
from tunerkit_gguf.tensors import pair_of, permute, unpermute, without


def test_a_permuted_head_alternates_between_its_halves() -> None:
    """Row 2 i of a head is row i of its first half, row 2 i + 1 is row i of its second half; heads stay in order."""
    rows = torch.arange(12.0).unsqueeze(1)
    assert permute(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@given(heads=st.integers(1, 4), half=st.integers(1, 4), rank=st.integers(0, 3))
def test_unpermuting_undoes_permuting(heads: int, half: int, rank: int) -> None:
    """In both orders, for any number of heads."""
    rows = torch.randn(2 * heads * half, rank)
    assert torch.equal(unpermute(permute(rows, heads), heads), rows)
    assert torch.equal(permute(unpermute(rows, heads), heads), rows)


@given(rank=st.integers(1, 9), more=st.integers(0, 9))
def test_a_pair_adds_its_product_under_the_rule_of_llama_cpp(rank: int, more: int) -> None:
    """Their product times alpha / r is the same, also if alpha is not the pair's own rank."""
    generator = torch.Generator().manual_seed(rank + 10 * more)
    product = Factors(q=torch.randn(rank, 6, generator=generator), p=torch.randn(5, rank, generator=generator))
    alpha = rank + more
    pair = pair_of(product, alpha=alpha)
    torch.testing.assert_close(alpha / pair.rank * (pair.b @ pair.a), product.p @ product.q, rtol=1e-5, atol=1e-6)


def test_a_padding_token_has_no_column() -> None:
    """Its column is 0, the others are as they were; without a padding token nothing changes."""
    q = torch.ones(2, 4)
    assert without(q, 1).tolist() == [[1, 0, 1, 1]] * 2
    assert torch.equal(without(q, None), q)
