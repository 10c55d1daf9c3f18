"""HRA (Yuan et al., NeurIPS 2024, arXiv 2405.17484): W times a chain of Householder reflections."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import TargetError
from tunerkit.plugin import BaseLayer, Factors, parameter, setting
from tunerkit_methods.inputs import refuse_ids
from tunerkit_methods.sizes import at_most

NAMES = {
    "type": "HRA",
    "tensors": {"u": {"name": "hra_u", "shape": ["in", "rank"]}},
    "settings": {"rank": "r"},
    "constants": {"apply_GS": False},
    "ignored": ["init_weights"],
    "layers": ["Linear", "Conv2d"],
    "bias": "hra_only",
}


def sizes(base: BaseLayer, config: Any) -> Mapping[str, int]:
    """The number of reflections: 8, or less where the layer has fewer inputs; always even."""
    refuse_ids(base, "hra reflects")
    if (config.rank or 0) % 2:
        raise TargetError(f"rank is {config.rank}; the reflections start in equal pairs, so take an even one")
    if base.in_features == 1:
        raise TargetError("hra reflects the inputs of a layer, and this one has a single input; leave it out")
    most = base.in_features - base.in_features % 2
    return {"rank": at_most(config.rank, 8, most, "rank, the inputs of the layer")}


def pairs(u: Tensor) -> None:
    """Fill (in, rank) with random columns, each twice: the two reflections cancel out."""
    u.copy_(nn.init.kaiming_uniform_(u[:, ::2].contiguous(), a=5**0.5).repeat_interleave(2, dim=1))


@tunerkit.method("hra", sizes=sizes, start="rounding", multiplies=True, foreign={"peft": NAMES})
def hra(
    weight: Tensor,
    u: Tensor = parameter("in", "rank", start=pairs),
    rank: int | None = setting(None, ge=2, doc="reflections, an even number; None means 8 if they fit", aka=("r",)),
) -> Factors:
    """W H₁ … H_r, H = I − 2 u uᵀ / ‖u‖² (equation 3), with the columns u of U (in, rank).

    The product of all is I − U S⁻¹ Uᵀ for columns of length 1, where S (rank, rank) is the upper triangle of Uᵀ U with
    half of its diagonal. So ΔW = −(W U S⁻¹) Uᵀ has a low rank, and is never computed as a matrix.
    """
    unit = (u / torch.linalg.vector_norm(u, dim=0)).to(weight.dtype)
    half = (unit.mT @ unit).triu(1) + 0.5 * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
    return Factors(q=unit.mT, p=-torch.linalg.solve_triangular(half, weight @ unit, upper=True, left=False))
