"""LoHa (Hyeon-Woo et al., ICLR 2022, arXiv 2108.06098): the product, entry by entry, of two low-rank matrices."""

from functools import partial

from torch import Tensor, nn

import tunerkit
from tunerkit.plugin import parameter, setting

NAMES = {
    "type": "LOHA",
    "tensors": {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"},
    "settings": {"rank": "r", "alpha": "alpha"},
    "constants": {"use_effective_conv2d": False},
    "training": {"rank_dropout": 0.0, "module_dropout": 0.0},
    "ignored": ["init_weights"],
    "layers": ["Linear", "Conv1d", "Conv2d"],
}


@tunerkit.method("loha", foreign={"peft": NAMES})
def loha(
    b1: Tensor = parameter("out", "rank", start=partial(nn.init.normal_, std=0.1)),
    a1: Tensor = parameter("rank", "in", start=nn.init.normal_),
    b2: Tensor = parameter("out", "rank"),
    a2: Tensor = parameter("rank", "in", start=nn.init.normal_),
    rank: int = setting(8, ge=1, doc="rank of both products; may exceed the layer's sides", aka=("r",)),
    alpha: float = setting(8.0, gt=0, doc="numerator of the scale alpha / rank"),
) -> Tensor:
    """ΔW = (alpha / rank) · (B₁ A₁) ∘ (B₂ A₂), with B (out, rank) and A (rank, in); B₂ starts at 0 (proposition 1)."""
    return alpha / rank * (b1 @ a1) * (b2 @ a2)
