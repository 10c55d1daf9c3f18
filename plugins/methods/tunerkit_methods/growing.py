"""Growing ranks: further triplets where their gradient is largest (GradMax, Evci et al., ICLR 2022, arXiv 2201.05125).

GradMax adds neurons to a network. Here a neuron is a triplet: its column of B starts at 0, and its row of A lies where
the gradient of that column is longest. One budget is spent on all targets, as in AdaLoRA.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit import plugin as tk
from tunerkit.errors import StepError
from tunerkit.plugin import hookimpl, setting
from tunerkit_methods.growth import growths_by, spread
from tunerkit_methods.sizes import at_most


@attrs.frozen
class Config(tk.AdapterConfig):
    """The settings of growing ranks."""

    target_rank: int | None = setting(None, ge=1, doc="average rank at the end; None: 8, or less where no more fits")
    scale: float = setting(2.0, gt=0, doc="factor of B A; it does not change with the ranks")
    growths: int = setting(10, ge=1, doc="how many times the ranks grow, by equal parts of the budget")
    until: float = setting(0.5, gt=0, le=1, doc="share of training in which they grow")


class Grown(tk.Adapter):
    """Adds s B A x, with ``a`` (r, in) and ``b`` (out, r) of rank 1 at the start, and looks for more.

    P̂, ``left`` (out, w), and Q̂, ``right`` (w, in), add nothing, and have gradients: with G that of B A, that of P̂ is
    G Q̂ᵀ, and that of Q̂ is P̂ᵀ G. They are the two halves of a subspace iteration for the largest triplets of G.
    """

    reads_output, reads_weight = False, False
    rank_dims: ClassVar[Mapping[str, int]] = {"a": 0, "b": 1}

    def __init__(self, base: tk.BaseLayer, config: Config) -> None:
        super().__init__()
        outs, ins, most = base.out_features, base.in_features, min(base.out_features, base.in_features)
        at_most(config.target_rank, 1, most, "target_rank, the rank of the weight")
        self.most, self.scale = most, config.scale
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(1, ins), a=math.sqrt(5)))
        self.b = nn.Parameter(torch.zeros(outs, 1))
        self.left = nn.Parameter(nn.init.orthogonal_(torch.empty(outs, min(4, most))))
        self.right = nn.Parameter(nn.init.orthogonal_(torch.empty(min(4, most), ins)))

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> dict[str, Any]:
        """B A; in training B A + (P̂ − P̂) Q̂ + P̂ (Q̂ − Q̂), where only the differences have gradients."""
        if not self.training:
            return {"q": self.a, "p": self.b, "scale": self.scale}
        p, q = self.left.detach(), self.right.detach()
        q, p = torch.cat([self.a, q, self.right - q]), torch.cat([self.b, self.left - p, p], dim=1)
        return {"q": q, "p": p, "scale": self.scale}

    def forward(self, base: tk.BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return tk.add_low_rank(base, x, y, **self.product())

    def found(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """P̂ and Q̂ for the next look, and scores (w,): the largest triplets of G in directions that A cannot follow."""
        left, right = left.float().nan_to_num(0, 0, 0), right.float().nan_to_num(0, 0, 0)
        own = torch.linalg.qr(self.a.float().T).Q
        _, scores, rows = torch.linalg.svd(right - right @ own @ own.T, full_matrices=False)
        return [torch.linalg.qr(left).Q, rows, scores]

    def grow(self, count: int, seed: int) -> list[tk.Growth]:
        """Further triplets: the rows of Q̂, and random ones where more are due; as long as LoRA's rows."""
        random = torch.randn(count, self.a.shape[1], generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([self.right, nn.functional.normalize(random).to(self.right)])[:count] / 3**0.5
        return [tk.Growth(self.a, 0, rows), tk.Growth(self.b, 1, self.b.new_zeros(len(self.b), count))]


@hookimpl
def tunerkit_methods() -> Iterator[tk.Method]:
    yield tk.Method("growing", config=Config, needs_steps=True)


@hookimpl
def tunerkit_build_adapter(base: tk.BaseLayer, config: Config) -> Grown:
    return Grown(base, config)


@hookimpl
def tunerkit_delta(adapter: Grown, base: tk.BaseLayer) -> tk.Delta:
    return tk.Delta(weight=tk.low_rank_delta(base, **adapter.product()))


@hookimpl
def tunerkit_factors(adapter: Grown) -> tk.Factors:
    return tk.low_rank_factors(adapter.a, adapter.b, scale=adapter.scale)


@hookimpl
def tunerkit_start(tuner: Any, total_steps: int | None, optimizer: Any) -> list[list[Tensor]]:
    if total_steps is None:
        raise StepError("growing needs the length of training: attach(..., total_steps=...)")
    if obstacle := tk.resize_obstacle(tuner.parameters(), optimizer):
        raise StepError(f"growing changes ranks during training, and {obstacle}")
    return [[torch.zeros_like(each) for each in (layer.left, layer.right)] for layer in tuner.adapters().values()]


@hookimpl
def tunerkit_budget(tuner: Any, step: int | None) -> int | None:
    if step is None or tuner.total_steps is None:
        return None  # the sum of the ranks
    config, most = tuner.config, [layer.most for layer in tuner.adapters().values()]
    final = min((config.target_rank or 8) * len(most), sum(most)) - len(most)
    return (
        len(most) + final * max(0, growths_by(step, tuner.total_steps, config.growths, config.until)) // config.growths
    )


@hookimpl
def tunerkit_before_step(tuner: Any) -> list[nn.Parameter]:
    return [each for layer in tuner.adapters().values() for each in (layer.left, layer.right)]


@hookimpl
def tunerkit_after_step(tuner: Any, step: int) -> Mapping[str, int] | None:
    """Add up the gradients of P̂ and Q̂. When a growth is due, add the largest triplets, and look elsewhere."""
    layers, config = list(tuner.adapters().values()), tuner.config
    for layer, sums in zip(layers, tuner.state, strict=True):
        for kept, grad in zip(sums, (layer.left.grad, layer.right.grad), strict=True):
            kept += 0 if grad is None else grad
    now, before = (growths_by(at, tuner.total_steps, config.growths, config.until) for at in (step, step - 1))
    if now == before:
        return None
    found = [layer.found(*sums) for layer, sums in zip(layers, tuner.state, strict=True)]
    tuner.agree_([each for tensors in found for each in tensors], "the candidates")
    for layer, sums, (left, right, _) in zip(layers, tuner.state, found, strict=True):
        layer.left.copy_(left), layer.right.copy_(right), sums[0].zero_(), sums[1].zero_()
    rooms = [layer.most - layer.rank for layer in layers]
    counts = spread([scores.tolist() for *_, scores in found], rooms, tuner.budget(step) - tuner.budget())
    growths = [each for at, count in counts.items() for each in layers[at].grow(count, 1000 * step + at)]
    if obstacle := tk.grow_(growths, tk.optimizer_of(tuner)):
        raise StepError(f"growing changes ranks during training, and {obstacle}")
    return tuner.ranks() if growths else None


@hookimpl
def tunerkit_state(tuner: Any) -> tk.State:
    return tk.State({f"{at}.{side}": sums[side] for at, sums in enumerate(tuner.state) for side in (0, 1)}, {})


@hookimpl
def tunerkit_restore(tuner: Any, state: tk.State) -> None:
    for name, saved in state.tensors.items():
        at, side = map(int, name.split("."))
        tuner.state[at][side].copy_(saved)
