"""IA³ (Liu et al., NeurIPS 2022, arXiv 2205.05638): one trained factor for each output of a layer, or each input."""

from collections.abc import Iterable, Iterator

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
            "chosen": {"feedforward": [1, "in"]},
        }
    },
    "settings": {"feedforward": {"name": "feedforward_modules", "targets": True}},
    "ignored": ["init_ia3_weights"],
    "layers": ["Linear", "Conv1D", "Conv2d", "Conv3d"],
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of IA³."""

    feedforward: tuple[str, ...] = setting(
        (), doc="targets whose input is scaled and not the output, such as down_proj", aka=("feedforward_modules",)
    )

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        return ((pattern, "feedforward") for pattern in self.feedforward)


class Scaling(Adapter):
    """l ⊙ (W x + b), with l (out,) (equations 1 and 2); of a feed-forward layer W (l ⊙ x) + b, with l (in,) (3)."""

    reads_weight = True

    def __init__(self, features: int, is_input: bool) -> None:
        super().__init__()
        self.reads_output = not is_input  # type: ignore[misc]  # of this target alone
        self.l = nn.Parameter(torch.ones(features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        if self.reads_output:
            return (y * base.shape_bias(self.l)).to(y.dtype)  # near 1, bf16 would round the factor itself
        return y + through(base, x, y, self.l.dtype, lambda rows, _: rows * (self.l - 1)).to(y.dtype)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("ia3", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config) -> Scaling:
    is_input = any(matches(pattern, target.path) for pattern in config.feedforward)
    if is_input and not (base.linear or base.lends):
        raise TargetError(
            "ia3 scales the inputs of linear layers alone; leave other layers out of feedforward, or out of targets"
        )
    return Scaling(base.in_features if is_input else base.out_features, is_input)


@hookimpl
def tunerkit_delta(adapter: Scaling, base: BaseLayer) -> Delta:
    change, bias, weight = adapter.l - 1, base.bias(), wide_weight(base, adapter.l.dtype)
    if not adapter.reads_output:
        return Delta(weight=weight * change)
    return Delta(weight=change[:, None] * weight, bias=None if bias is None else change * bias)
