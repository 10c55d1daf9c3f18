"""Growing ranks: further triplets where their gradient is largest (GradMax, Evci et al., ICLR 2022, arXiv 2201.05125).

GradMax adds neurons to a network. Here a neuron is a triplet: its column of B starts at 0, and its row of A lies where
the gradient of that column is longest. One budget is spent on all targets, as in AdaLoRA.
"""

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit import plugin as tk
from tunerkit_methods.growth import budget_by, further, growths_by, largest, looking, spread
from tunerkit_methods.sizes import at_most

FAILS = {"gradients_are_true": "what looks for triplets adds nothing and has a gradient"}


@attrs.frozen
class Config(tk.AdapterConfig):
    """The settings of growing ranks."""

    target_rank: int | None = tk.setting(None, ge=1, doc="average rank at the end; None: 8, or less where no more fits")
    scale: float = tk.setting(2.0, gt=0, doc="factor of B A; it does not change with the ranks")
    growths: int = tk.setting(10, ge=1, doc="how many times the ranks grow, by equal parts of the budget")
    until: float = tk.setting(0.5, gt=0, le=1, doc="share of training in which they grow")


class Grown(tk.Adapter):
    """Adds s B A x, with ``a`` (r, in) and ``b`` (out, r) of rank 1 at the start, and looks for more.

    ``left`` (out, w) and ``right`` (w, in) add nothing, and have gradients. With G that of B A, and P̂ and Q̂ for their
    directions, these are G Q̂ᵀ and P̂ᵀ G. Both are the running averages of their gradients: the two halves of a subspace
    iteration for the largest singular triplets of G. Where gradients are clipped, theirs count.
    """

    reads_output, reads_weight = False, False
    rank_dims: ClassVar[dict[str, int]] = {"a": 0, "b": 1}

    def __init__(self, base: tk.BaseLayer, config: Config) -> None:
        super().__init__()
        self.most, self.scale = min(base.out_features, base.in_features), config.scale
        at_most(config.target_rank, 1, self.most, "target_rank, the rank of the weight")
        self.a = nn.Parameter(nn.init.orthogonal_(torch.empty(1, base.in_features), 3**-0.5))
        self.b = nn.Parameter(torch.zeros(base.out_features, 1))
        # So small that the first gradients outweigh them, and no smaller than their dtype can hold.
        self.small = 1e-4 if config.adapter_dtype == "float16" else 1e-9
        self.left = nn.Parameter(nn.init.orthogonal_(torch.empty(base.out_features, min(4, self.most)), self.small))
        self.right = nn.Parameter(nn.init.orthogonal_(torch.empty(min(4, self.most), base.in_features), self.small))

    def product(self) -> dict[str, Any]:
        q, p = looking(self.a, self.b, self.left, self.right) if self.training else (self.a, self.b)
        return {"q": q, "p": p, "scale": self.scale}

    def forward(self, base: tk.BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return tk.add_low_rank(base, x, y, **self.product())


@tk.hookimpl
def tunerkit_methods() -> list[tk.Method]:
    return [tk.Method("growing", config=Config, needs_steps=True, foreign={"testing": {"expected_failures": FAILS}})]


@tk.hookimpl
def tunerkit_build_adapter(base: tk.BaseLayer, config: Config) -> Grown:
    return Grown(base, config)


@tk.hookimpl
def tunerkit_delta(adapter: Grown, base: tk.BaseLayer) -> tk.Delta:
    return tk.Delta(weight=tk.low_rank_delta(base, **adapter.product()))


@tk.hookimpl
def tunerkit_factors(adapter: Grown) -> tk.Factors:
    return tk.low_rank_factors(adapter.a, adapter.b, scale=adapter.scale)


@tk.hookimpl
def tunerkit_start(tuner: Any, total_steps: int | None, optimizer: Any) -> None:
    unknown = "the length of training is unknown: attach(..., total_steps=...)" if total_steps is None else None
    if obstacle := unknown or tk.resize_obstacle(tuner.parameters(), optimizer):
        raise tk.StepError(f"growing changes ranks during training, and {obstacle}")


@tk.hookimpl
def tunerkit_budget(tuner: Any, step: int | None) -> int | None:
    config, total, most = tuner.config, tuner.total_steps, [layer.most for layer in tuner.adapters().values()]
    if step is None or total is None:
        return None  # the sum of the ranks
    growth = growths_by(step, total, config.growths, config.until)
    return budget_by(growth, config.growths, most, config.target_rank or 8)


@tk.hookimpl
def tunerkit_before_step(tuner: Any) -> list[nn.Parameter]:
    return [each for layer in tuner.adapters().values() for each in (layer.left, layer.right)]


@tk.hookimpl
def tunerkit_after_step(tuner: Any, step: int) -> dict[str, int] | None:
    """Average what ``left`` and ``right`` see. When triplets are due, add the largest, and look elsewhere."""
    for each in tunerkit_before_step(tuner):
        each.lerp_(each if each.grad is None else each.grad.nan_to_num(0, 0, 0), 0.1)
    layers, due = list(tuner.adapters().values()), tuner.budget(step) - tuner.budget()
    if due <= 0:
        return None
    found = [largest(layer.a, layer.left, layer.right) for layer in layers]
    tuner.agree_([each for tensors in found for each in tensors], "the candidates")
    rooms, growths = [layer.most - layer.rank for layer in layers], []
    for at, count in spread([scores.tolist() for *_, scores in found], rooms, due).items():
        a, b, rows = layers[at].a, layers[at].b, further(found[at][1], count, 1000 * step + at)
        growths += [tk.Growth(a, 0, rows), tk.Growth(b, 1, b.new_zeros(len(b), count))]
    for layer, (left, right, _) in zip(layers, found, strict=True):
        layer.left.copy_(left * layer.small)
        layer.right.copy_(right * layer.small)
    if obstacle := tk.grow_(growths, tk.optimizer_of(tuner)):
        raise tk.StepError(f"growing changes ranks during training, and {obstacle}")
    return dict(tuner.ranks())
