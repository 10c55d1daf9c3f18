"""IA³ (Liu et al., NeurIPS 2022, arXiv 2205.05638): one trained factor for each output of a layer, or each input."""

from collections.abc import Iterable, Iterator
from typing import Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, Target, hookimpl, matches, setting
from tunerkit_methods.inputs import through, wide_weight

NAMES = {
    "type": "IA3",
    "tensors": {
        "l": {
            "name": "ia3_l",
            "shape": ["out", 1],
            "convolution": [1, "out", "1*"],
            "chosen": {"feedforward": [1, "channels", "1*"]},
        }
    },
    "settings": {"feedforward": {"name": "feedforward_modules", "targets": True}},
    "ignored": ["init_ia3_weights"],
    "layers": ["Linear", "Conv1D", "Conv2d", "Conv3d"],
}
CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@attrs.frozen
class Config(AdapterConfig):
    """The settings of IA³."""

    feedforward: tuple[str, ...] = setting(
        (), doc="targets whose input is scaled and not the output, such as down_proj", aka=("feedforward_modules",)
    )

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        return ((pattern, "feedforward") for pattern in self.feedforward)


class Scaling(Adapter):
    """l ⊙ (W x + b), with l (out,) (equations 1 and 2); of a feed-forward layer W (l ⊙ x) + b, with l (in,) (3).

    In a convolution, the input has channels, so that l (channels,) is the same in the whole kernel.
    """

    reads_weight = True

    def __init__(self, features: int, is_input: bool) -> None:
        super().__init__()
        self.reads_output = not is_input  # type: ignore[misc]  # of this target alone
        self.l = nn.Parameter(torch.ones(features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        if self.reads_output:
            return (y * base.shape_bias(self.l)).to(y.dtype)  # near 1, bf16 would round the factor itself
        return y + through(base, x, y, self.l.dtype, lambda rows, _: rows * (self.of_inputs(base) - 1)).to(y.dtype)

    def of_inputs(self, base: BaseLayer) -> Tensor:
        """Return l at the columns of W, (in,); (out, in) in a convolution with groups: rows have other channels."""
        if not isinstance(base.module, CONVOLUTIONS):
            return self.l
        groups = base.module.groups
        kernel = base.in_features * groups // len(self.l)
        factors: Tensor = self.l.view(groups, -1).repeat_interleave(kernel, 1)
        return factors[0] if groups == 1 else factors.repeat_interleave(base.out_features // groups, 0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("ia3", config=Config, multiplies=True, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config) -> Scaling:
    is_input = any(matches(pattern, target.path) for pattern in config.feedforward)
    if is_input and not (base.linear or base.lends or isinstance(base.module, CONVOLUTIONS)):
        raise TargetError(
            "ia3 scales the inputs of linear layers and of convolutions alone; leave other layers out of feedforward, "
            "or out of targets"
        )
    inputs = base.module.in_channels if isinstance(base.module, CONVOLUTIONS) else base.in_features
    return Scaling(inputs if is_input else base.out_features, is_input)


@hookimpl
def tunerkit_delta(adapter: Scaling, base: BaseLayer) -> Delta:
    bias, weight = base.bias(), wide_weight(base, adapter.l.dtype)
    if not adapter.reads_output:
        return Delta(weight=weight * (adapter.of_inputs(base) - 1))
    change = adapter.l - 1
    return Delta(weight=change[:, None] * weight, bias=None if bias is None else change * bias)
