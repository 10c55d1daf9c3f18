"""Checks of a wrapped model that several test files use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from tests.support.toys import Toys


@contextmanager
def untouched(toys: "Toys", model: nn.Module) -> Iterator[None]:
    """Check that the model is unchanged after the block, whatever happens inside."""
    before = toys.snapshot(model)
    yield
    assert toys.same(toys.snapshot(model), before)


def losing(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()  # type: ignore[no-any-return]
