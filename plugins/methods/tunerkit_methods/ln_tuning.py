"""LN tuning (Zhao et al., ICLR 2024, arXiv 2312.11420): the weights and biases of norms are trained."""

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, hookimpl

NAMES = {
    "type": "LN_TUNING",
    "tensors": {"weight": "ln_tuning_layers.weight", "bias": {"name": "ln_tuning_layers.bias", "optional": True}},
    "layers": ["Module"],
}
FAILS = {} if torch.__version__ >= "2.12" else {"compiles": "torch cuts the graph at an adapted norm"}


@attrs.frozen
class Config(AdapterConfig):
    """Only the settings of every method; by default the targets are all norms outside of output heads."""


def weight_of(base: Any) -> Tensor:
    """The norm's own parameter (out,), which is not what it multiplies by where that is 1 more."""
    own: Tensor = base.tensor("weight").detach()
    return base.dense()[:, 0] - base.offset if own.is_meta or not own.numel() else own  # dense() loads it


class TrainedNorm(Adapter):
    """Replaces the norm's ``weight`` (out,) and, where it has one, its ``bias`` (out,), which start as its own."""

    reads_output = False
    reads_weight = True
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        for name, own in (("weight", weight_of(base)), ("bias", base.bias())):
            # Core casts it to the adapter's dtype, which may be fp64.
            start = None if own is None else own.to("cpu", torch.promote_types(own.dtype, torch.float32), copy=True)
            self.register_parameter(name, None if start is None else nn.Parameter(start))

    def change(self, base: BaseLayer) -> tuple[Tensor, Tensor | None]:
        """What is added to both: 0 at the start, since the norm's are rounded as the trained ones are."""
        own = base.bias()
        bias = None if own is None else self.bias - own.to(self.bias)
        return self.weight - weight_of(base).to(self.weight), bias

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = self.change(base)
        added = weight * base.normalised(x.to(weight.device, weight.dtype))
        return y + (added if bias is None else added + bias).to(y)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    foreign: dict[str, dict[str, Any]] = {"peft": NAMES, "testing": {"expected_failures": FAILS}}
    yield Method("ln-tuning", config=Config, targets="norms", multiplies=True, foreign=foreign)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer) -> TrainedNorm:
    return TrainedNorm(base)


@hookimpl
def tunerkit_delta(adapter: TrainedNorm, base: BaseLayer) -> Delta:
    weight, bias = adapter.change(base)
    return Delta(weight=weight[:, None], bias=bias)
