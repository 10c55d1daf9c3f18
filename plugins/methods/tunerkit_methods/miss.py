"""MiSS (Kang and Yin, 2024, arXiv 2409.15371; first named Bone): all shards of the input share one small matrix."""

from typing import Any

import torch
from torch import Tensor

import tunerkit
from tunerkit.plugin import BaseLayer, Factors, parameter, setting
from tunerkit_methods.sizes import at_most

NAMES = {
    "type": "MISS",
    "tensors": {"block": {"name": "miss_block", "shape": ["rank", "out"]}},
    "settings": {"rank": "r", "dropout": "miss_dropout"},
    "constants": {"init_weights": (True, False)},  # "bat" and "mini" are other products
    "bias": "MiSS_only",
    "ignored": ["mini_r"],
    "layers": ["Linear"],
}


def sizes(base: BaseLayer, config: Any) -> dict[str, int]:
    """The rank that fits a layer."""
    return {"rank": at_most(config.rank, min(64, base.out_features), base.in_features, "rank, the layer's inputs")}


@tunerkit.method("miss", sizes=sizes, foreign={"peft": NAMES})
def miss(
    base: BaseLayer,
    block: Tensor = parameter("rank", "out"),
    rank: int | None = setting(None, ge=1, doc="features in a shard; None takes 64, or less", aka=("r",)),
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input that is dropped", aka=("miss_dropout",)),
) -> Factors:
    """ΔW x = Bᵀ Σᵢ xᵢ, where xᵢ are the shards of x, of ``rank`` features each, and B (rank, out) starts at 0.

    So ΔW = Bᵀ S, where S (rank, in) is a row of identities, and adds the shards up. The last one may be shorter.
    """
    identity = torch.eye(len(block), dtype=block.dtype, device=block.device)
    shards = identity.repeat(1, -(-base.in_features // len(block)))[:, : base.in_features]
    return Factors(q=shards, p=block.t())
