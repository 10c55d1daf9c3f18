"""RoAd (Liao and Monz, NeurIPS 2024, arXiv 2409.00119): turns and stretches pairs of a layer's outputs."""

from collections.abc import Iterator
from typing import Literal

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, hookimpl, setting
from tunerkit_methods.inputs import wide_weight
from tunerkit_methods.sizes import divisor

NAMES = {
    "type": "ROAD",
    "tensors": {"theta": "road_theta", "alpha": "road_alpha"},
    "settings": {
        "variant": {"name": "variant", "values": {1: "road_1", 2: "road_2", 4: "road_4"}},
        "group_size": "group_size",
    },
    "ignored": ["init_weights"],
    "layers": ["Linear"],
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of RoAd."""

    variant: Literal[1, 2, 4] = setting(1, doc="angles and factors per pair of outputs")
    group_size: int = setting(2, ge=2, doc="outputs in a group, whose halves form the pairs; 2 pairs neighbours")


class Turning(Adapter):
    """Replaces the outputs (h₁, h₂) of a pair by (α₁ cos θ₁ h₁ − α₂ sin θ₂ h₂, α₃ sin θ₃ h₁ + α₄ cos θ₄ h₂).

    Equation 4 of the paper. Variant 1 has one θ and one α for each pair, variant 2 one for each output, variant 4 all.
    """

    reads_output = True
    reads_weight = True

    def __init__(self, features: int, variant: int, group: int) -> None:
        super().__init__()
        self.variant, self.side = variant, group // 2
        self.theta = nn.Parameter(torch.zeros(features * variant // 2))
        self.alpha = nn.Parameter(torch.ones(features * variant // 2))

    def change(self, values: Tensor, base: BaseLayer | None) -> Tensor:
        """What is added to outputs in the layout of ``base``, or to rows (out, ...) without it."""
        theta, alpha = (each.view(-1, self.variant, self.side) for each in (self.theta, self.alpha))
        (theta1, theta2), (alpha1, alpha2) = (
            each.split(2, dim=1) if self.variant == 4 else (each, each) for each in (theta, alpha)
        )
        both = (len(theta), 2, self.side)
        own = (alpha1 * theta1.cos() - 1).expand(both).flatten()  # (out,)
        up, down = (alpha2 * theta2.sin()).expand(both).unbind(1)
        other = torch.stack((-up, down), dim=1).flatten()
        if base is not None:
            own, other = base.shape_bias(own), base.shape_bias(other)
        elif values.ndim == 2:
            own, other = own[:, None], other[:, None]
        dim = -own.ndim
        swapped = values.unflatten(dim, (-1, 2, self.side)).flip(dim - 1).flatten(dim - 2, dim)
        change: Tensor = own * values + other * swapped
        return change

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(y, base).to(y.dtype)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("road", config=Config, multiplies=True, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Turning:
    module, group = base.module, config.group_size
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    outputs = base.out_features // groups  # a pair in two groups of a convolution would be no change of its weight
    if outputs % 2 or group % 2:
        where = " in each group" if groups > 1 else ""
        raise TargetError(
            f"road turns pairs of outputs: the layer has {outputs}{where}, group_size is {group}; both must be even"
        )
    group = divisor(group, group, outputs, "group_size, the outputs", least=2, step=2)
    return Turning(base.out_features, config.variant, group)


@hookimpl
def tunerkit_delta(adapter: Turning, base: BaseLayer) -> Delta:
    bias, weight = base.bias(), wide_weight(base, adapter.theta.dtype)
    return Delta(weight=adapter.change(weight, None), bias=None if bias is None else adapter.change(bias, None))
