"""A toy method that trains the weights and biases of norms, as LN-tuning does (Zhao et al., arXiv 2312.11420)."""

import attrs
from torch import Tensor, nn

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method


@attrs.frozen
class NormConfig(AdapterConfig):
    """Only the settings of every method."""


class TrainedNorm(Adapter):
    """Trains ``weight`` (out,) and ``bias`` (out,), which start as the norm's own; a norm may have no bias."""

    reads_output = False
    reads_weight = True

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.dense()[:, 0].clone())
        bias = base.bias()
        self.bias = None if bias is None else nn.Parameter(bias.clone())

    def change(self, base: BaseLayer) -> tuple[Tensor, Tensor | None]:
        """Return the differences to the norm's own: of the weight (out, 1), of the bias (out,)."""
        own = base.bias()
        return self.weight[:, None] - base.dense(), None if self.bias is None or own is None else self.bias - own

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        weight, bias = self.change(base)
        added = weight[:, 0] * base.normalised(x.to(self.weight.dtype))
        return (y + (added if bias is None else added + bias)).to(y.dtype)


class NormPlugin(OneMethod):
    """``toy-norms``."""

    method = Method("toy-norms", config=NormConfig, targets="norms")

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> TrainedNorm:
        return TrainedNorm(base)

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: TrainedNorm, base: BaseLayer) -> Delta:
        weight, bias = adapter.change(base)
        return Delta(weight=weight, bias=bias)
