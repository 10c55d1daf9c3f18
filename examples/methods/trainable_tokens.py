"""Trainable tokens: some rows of an embedding are trained, the others stay as they are."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import (
    Adapter,
    AdapterConfig,
    BaseLayer,
    Factors,
    Method,
    TargetError,
    add_low_rank,
    hookimpl,
    setting,
)


@attrs.frozen
class Config(AdapterConfig):
    """The settings of trainable tokens."""

    tokens: tuple[int, ...] = setting((0,), doc="the ids whose rows are trained; name the embedding in targets")


class Rows(Adapter):
    """Adds a trained row of ``rows`` (features, k) for each of k ids; ``chosen`` (k, vocabulary) says which."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    chosen: Tensor

    def __init__(self, base: BaseLayer, tokens: tuple[int, ...]) -> None:
        super().__init__()
        if max(tokens) >= base.in_features:
            raise TargetError(f"it has {base.in_features} rows, and tokens names row {max(tokens)}")
        self.rows = nn.Parameter(torch.zeros(base.out_features, len(tokens)))
        chosen = torch.zeros(len(tokens), base.in_features).index_put_(
            (torch.arange(len(tokens)), torch.tensor(tokens)), torch.tensor(1.0)
        )
        self.register_buffer("chosen", chosen, persistent=False)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.chosen, p=self.rows, scale=1.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("trainable-tokens", config=Config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Rows:
    return Rows(base, config.tokens)


@hookimpl
def tunerkit_factors(adapter: Rows) -> Factors:
    return Factors(q=adapter.chosen, p=adapter.rows)
