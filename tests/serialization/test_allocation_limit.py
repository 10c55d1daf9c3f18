"""A plugin that builds an adapter from a file's config cannot make tensors out of proportion to the file."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunerkit.errors import FileError
from tunerkit.records import Target
from tunerkit.serialization.tensor_checks import AllocationLimit, limit_for

HUGE = 10**9
LARGE = {"rank": 10**6}
FILE = {"layer.adapter.a": torch.zeros(2, 64), "layer.adapter.b": torch.zeros(64, 2)}
WEIGHT = torch.ones(64, 64)
TARGET = Target("layer", nn.Linear(64, 64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(HUGE),
        lambda: torch.empty(2, HUGE),
        lambda: torch.empty((HUGE, 4), dtype=torch.bfloat16),
        lambda: torch.randn(size=(HUGE, 4)),
        lambda: torch.ones(2**63),
        lambda: torch.full((10**400,), 0.0),
        lambda: torch.zeros(1).new_zeros(HUGE),
        lambda: torch.zeros(1).repeat(HUGE),
        lambda: torch.eye(10**6),
        lambda: torch.arange(HUGE),
        lambda: torch.zeros(3, 1).expand(3, HUGE),
        lambda: nn.Linear(64, HUGE),
        lambda: nn.Embedding(HUGE, 64),
        lambda: nn.Parameter(torch.rand(10**12, 10**12)),
    ],
)
def test_a_huge_tensor_is_refused_before_it_is_made(make: Callable[[], object]) -> None:
    """By size or by result, in every way in which an adapter makes its weights."""
    with (
        pytest.raises(FileError, match=r"x does not fit its own header.*'layer'.*than the 256 values"),
        limit_for(LARGE, FILE, "x")(TARGET),
    ):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(64, 64).double(),
        lambda: torch.linalg.svd(WEIGHT.double(), full_matrices=False),
        lambda: nn.init.orthogonal_(torch.empty(64, 2)),
        lambda: torch.eye(64) @ WEIGHT,
        lambda: nn.init.kaiming_uniform_(nn.Parameter(torch.empty(2, 64))),
    ],
)
def test_what_a_method_computes_from_the_weight_is_allowed(make: Callable[[], Any]) -> None:
    """A start may need factors of the weight; a target of the model's size is in proportion."""
    with limit_for(LARGE, FILE, "x")(TARGET):
        assert make() is not None


def test_packed_weights_count_as_what_they_stand_for() -> None:
    """A quantised layer holds two values in each byte, and a plugin may unpack them all."""
    layer = nn.Module()
    layer.register_buffer("packed", torch.zeros(512 * 512 // 8, dtype=torch.int32))
    with limit_for(LARGE, FILE, "x")(Target("layer", layer)):
        assert torch.zeros(512, 512).numel() == 2**18
        with pytest.raises(FileError):
            torch.zeros(4096, 4096)


def test_values_are_those_that_would_be_made_without_a_limit() -> None:
    """The limit draws no random numbers and changes no dtype."""

    def make() -> Tensor:
        torch.manual_seed(0)
        return nn.init.kaiming_uniform_(torch.empty(2, 64, dtype=torch.float64))

    with limit_for(LARGE, FILE, "x")(TARGET):
        limited = make()
    assert torch.equal(limited, make())


@pytest.mark.parametrize(
    ("config", "limited"),
    [
        ({"rank": 64, "dropout": 0.1, "targets": ["a"], "bias": True}, False),
        ({"rank": 2000}, False),  # a dimension of the file's tensors
        ({"rank": 2001}, True),
        ({"rank_pattern": {"a": [1, {"b": HUGE}]}}, True),
        ({"alpha": 1e30}, True),
    ],
)
def test_only_a_config_with_a_large_number_is_built_under_the_limit(config: object, limited: bool) -> None:
    """The limit costs time, and a config without such a number cannot ask for much."""
    with limit_for(config, {"layer.adapter.a": torch.zeros(2000, 1)}, "x")(TARGET) as entered:
        assert isinstance(entered, AllocationLimit) == limited


def test_what_adapters_share_counts_for_the_target_that_it_lies_beside() -> None:
    """Shared matrices are as large as the largest target, and the first one may be small."""
    shared = {**FILE, "layer.tunerkit.a": torch.empty(2, 10**5), "layer.tunerkit.adapter.b": torch.empty(10**5, 2)}
    with limit_for(LARGE, shared, "x")(TARGET):
        nn.Parameter(torch.randn(10, 10**5))
    with pytest.raises(FileError, match=r"than the 256 values"), limit_for(LARGE, FILE, "x")(TARGET):
        torch.randn(10, 10**5)
