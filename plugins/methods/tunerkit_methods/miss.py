"""MiSS (Kang and Yin, 2024, arXiv 2409.15371; first named Bone): all shards of the input share one small matrix."""

from typing import Any

import torch
from torch import Tensor

import tunerkit
from tunerkit.plugin import BaseLayer, Factors, parameter, setting
from tunerkit_methods.sizes import at_most, divisor

NAMES = {
    "type": "MISS",
    "tensors": {"block": {"name": "miss_block", "shape": ["rank", "out"]}},
    "settings": {
        **{"rank": "r", "dropout": "miss_dropout"},
        "columns": {"name": "init_weights", "values": {None: [True, False]}},  # "mini" and "bat" are other products
    },
    "ignored": ["mini_r"],
    "layers": ["Linear"],
}


def sizes(base: BaseLayer, config: Any) -> dict[str, int]:
    """The rank that fits a layer, and the number of columns that are trained."""
    default = min(64, base.out_features)
    columns = base.out_features if config.columns is None else config.columns
    return {
        "rank": at_most(config.rank, default, base.in_features, "rank, the layer's inputs"),
        "columns": divisor(columns, columns, base.out_features, "columns, the layer's outputs"),
    }


@tunerkit.method("miss", sizes=sizes, foreign={"peft": NAMES})
def miss(
    base: BaseLayer,
    block: Tensor = parameter("rank", "columns"),
    rank: int | None = setting(
        None, ge=1, doc="size of a shard of the input; None takes 64, or less for small layers", aka=("r",)
    ),
    columns: int | None = setting(
        None, ge=1, doc="trained columns, repeated over the outputs; None trains one for each", aka=("mini_r",)
    ),
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input that is dropped", aka=("miss_dropout",)),
) -> Factors:
    """ΔW x = Bᵀ Σᵢ xᵢ, where xᵢ are the shards of x, of ``rank`` features each, and B (rank, out) starts at 0.

    So ΔW = Bᵀ S, where S (rank, in) is a row of identities, and adds the shards up. The last one may be shorter.
    """
    repeats = -(-base.in_features // len(block)), base.out_features // block.shape[1]
    shards = torch.eye(len(block), dtype=block.dtype, device=block.device).repeat(1, repeats[0])
    return Factors(q=shards[:, : base.in_features], p=block.repeat(1, repeats[1]).t())
