"""A plugin that builds an adapter cannot make tensors out of proportion to the file, or else to the layers."""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunerkit.config import large_in
from tunerkit.errors import ConfigError, FileError
from tunerkit.records import Target
from tunerkit.serialization.tensor_checks import limit_for

HUGE = 10**9
FILE = {"layer.adapter.a": torch.zeros(2, 64), "layer.adapter.b": torch.zeros(64, 2)}
WEIGHT = torch.ones(64, 64)
TARGET = Target("layer", nn.Linear(64, 64))


def under_limit(target: Target = TARGET, tensors: Mapping[str, Tensor] = FILE) -> AbstractContextManager[object]:
    return limit_for(["$.rank"], [target], tensors, "x")(target)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(HUGE),
        lambda: torch.empty((HUGE, 4), dtype=torch.bfloat16),
        lambda: torch.randn(size=(HUGE, 4)),
        lambda: torch.ones(2**63),
        lambda: torch.full((10**400,), 0.0),
        lambda: torch.zeros(1).new_zeros(HUGE),
        lambda: torch.zeros(1).repeat(HUGE),
        lambda: torch.eye(10**6),
        lambda: torch.eye(2, HUGE),
        lambda: torch.arange(HUGE),
        lambda: torch.zeros(3, 1).expand(3, HUGE),
        lambda: nn.Linear(64, HUGE),
        lambda: nn.Parameter(torch.rand(10**12, 10**12)),
    ],
)
def test_a_huge_tensor_is_refused_before_it_is_made(make: Callable[[], object]) -> None:
    """By size or by result, in every way in which an adapter makes its weights."""
    with (
        pytest.raises(FileError, match=r"x does not fit its own header.*'layer'.*the file has 256"),
        under_limit(),
    ):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(64, 64).double(),
        lambda: torch.linalg.svd(WEIGHT.double(), full_matrices=False),
        lambda: nn.init.orthogonal_(torch.empty(64, 2)),
    ],
)
def test_what_a_method_computes_from_the_weight_is_allowed(make: Callable[[], Any]) -> None:
    """A start may need factors of the weight; a target of the model's size is in proportion."""
    with under_limit():
        assert make() is not None


def test_packed_weights_count_as_what_they_stand_for() -> None:
    """A quantised layer holds two values in each byte, and a plugin may unpack them all."""
    layer = nn.Module()
    layer.register_buffer("packed", torch.zeros(512 * 512 // 8, dtype=torch.int32))
    with under_limit(Target("layer", layer)):
        assert torch.zeros(512, 512).numel() == 2**18
        with pytest.raises(FileError):
            torch.zeros(4096, 4096)


def test_values_are_those_that_would_be_made_without_a_limit() -> None:
    """The limit draws no random numbers and changes no dtype."""

    def make() -> Tensor:
        torch.manual_seed(0)
        return nn.init.kaiming_uniform_(torch.empty(2, 64, dtype=torch.float64))

    with under_limit():
        limited = make()
    assert torch.equal(limited, make())


def test_only_numbers_above_the_usual_and_above_the_files_sizes_are_large() -> None:
    """The limit costs time, and a config without such a number cannot ask for much."""
    assert large_in({"rank": 1024}) == []
    assert large_in({"rank": 2000, "dropout": 0.1, "targets": ["a"], "bias": True}, [2000, 1]) == []
    config = {"rank": 2001, "rank_pattern": {"a": [1, {"b": HUGE}]}, "alpha": 1e30}
    assert large_in(config, [2000, 1]) == ["$.rank", "$.rank_pattern['a'][1]['b']", "$.alpha"]


def test_what_adapters_share_counts_for_the_target_that_it_lies_beside() -> None:
    """Shared matrices are as large as the largest target, and the first one may be small."""
    shared = {**FILE, "layer.tunerkit.a": torch.empty(2, 10**5), "layer.tunerkit.adapter.b": torch.empty(10**5, 2)}
    with under_limit(tensors=shared):
        nn.Parameter(torch.randn(15, 10**5))
    with pytest.raises(FileError, match=r"the file has 256"), under_limit():
        torch.randn(15, 10**5)


def test_a_new_adapter_is_compared_with_the_largest_layer() -> None:
    """Without a file, the error names the size, the layer's, and each setting that may ask for it."""
    targets = [TARGET, Target("large", nn.Linear(1000, 1000, device="meta"))]
    limit = limit_for(large_in({"rank": 4000, "ranks": {"a": [8, 10**6]}, "alpha": 16.0}), targets)
    with limit(TARGET):  # what all adapters share is built for the first target
        torch.zeros(4000, 1000)
    words = (
        "the adapter at 'layer' needs a tensor of 640,000,000 numbers, and the largest target has 1,001,000; "
        "lower the number @ $.rank, $.ranks['a'][1]"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}$"), limit(TARGET):
        torch.zeros(10**7, 64)
    with limit(TARGET):  # as of a ΔW for each triplet, which is nothing unusual
        torch.zeros(2**26, device="meta")
    block = Target("block", nn.Sequential(nn.Linear(8000, 8000, device="meta")))
    with limit_for(["$.rank"], [block])(block):  # what is in a block counts too
        torch.zeros(2**27, device="meta")
