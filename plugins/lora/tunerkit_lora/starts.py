"""Initialization of an adapter: at random, or from the base layer's weight, which is then subtracted."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from tunerkit.plugin import BaseLayer, Factors, TargetError
from tunerkit_lora.adapter import LoraAdapter, MovedLora
from tunerkit_lora.config import LoraConfig
from tunerkit_lora.loftq import lost
from tunerkit_lora.subtracted import MovedSubtracted, SubtractedLora

RANDOM: Final = ("kaiming", "gaussian")  # starts that need neither the weight nor data


def principal(weight: Tensor, rank: int, scale: float) -> Factors:
    """PiSSA: the largest singular triplets of W, each halved between A and B (Meng et al., arXiv 2404.02948, Eq. 2, 3).

    Args:
        weight: W, (out, in).
        rank: r, at most the smaller side of W.
        scale: The factor of B A, by which the triplets are divided.

    Returns:
        A (r, in) and B (out, r), with scale · B A the best approximation of W of that rank.
    """
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (sigma[:rank] / scale).sqrt()
    return Factors(q=root[:, None] * vh[:rank], p=u[:, :rank] * root)


def orthonormal(weight: Tensor, rank: int, scale: float) -> Factors:
    """OLoRA: B and A are the first columns and rows of a QR decomposition of W (Büyükakyüz, arXiv 2406.01775).

    Args:
        weight: W, (out, in).
        rank: r, at most the smaller side of W.
        scale: Not used: A and B are not divided by it, as in PEFT.

    Returns:
        A (r, in), and B (out, r) with orthonormal columns.
    """
    q, r = torch.linalg.qr(weight)
    return Factors(q=r[:rank], p=q[:, :rank])


_OF_THE_WEIGHT: Final[Mapping[str, Callable[[Tensor, int, float], Factors]]] = {
    "pissa": principal,
    "olora": orthonormal,
}


def build(path: str, base: BaseLayer, config: LoraConfig, *, loading: bool) -> LoraAdapter | SubtractedLora:
    """Build the adapter at one target.

    Args:
        path: The target's path.
        base: The base layer. Its weight is read only if the start needs it.
        config: The settings.
        loading: Whether a file's values replace the initial ones, which are then not computed.

    Raises:
        TargetError: The rank is larger than the start supports, or the start does not support stacks.
    """
    if base.stack and config.start not in RANDOM:
        raise TargetError(
            f"start {config.start!r} does not support a stack of matrices; set start='kaiming', or exclude the stack"
        )
    rank, scale = config.rank_at(path), config.scale_at(path)
    sizes = {"in_features": base.in_features, "out_features": base.out_features}
    if config.start not in RANDOM and not loading:
        _refuse_above(path, rank, config.start, **sizes)
    moves = config.most > 1  # a file may have other ranks than the config
    if config.start in (*RANDOM, "eva", "loftq"):
        plain = (MovedLora if moves else LoraAdapter)(
            **sizes, rank=rank, scale=scale, dropout=config.dropout, start=config.start, stack=base.stack
        )
        if config.start == "loftq" and not loading:
            plain.set_(principal(lost(path, base, config.original), rank, scale))
        return plain
    adapter = (MovedSubtracted if moves else SubtractedLora)(**sizes, rank=rank, scale=scale, dropout=config.dropout)
    if config.start in _OF_THE_WEIGHT and not loading:
        weight = base.dense().detach()
        # In fp32 or wider: torch has no decompositions in half precision, which would also lose the small triplets.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        adapter.set_start_(_OF_THE_WEIGHT[config.start](wide, rank, scale))
    return adapter


def _refuse_above(path: str, rank: int, start: str, *, in_features: int, out_features: int) -> None:
    most = in_features if start == "eva" else min(in_features, out_features)
    if rank > most:
        raise TargetError(
            f"rank {rank} is above {most}, the most directions that start {start!r} finds in a weight of "
            f"{out_features} x {in_features}; set rank_pattern={{{path!r}: {most}}}, or start='kaiming'"
        )
