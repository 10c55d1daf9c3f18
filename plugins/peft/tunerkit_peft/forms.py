"""The forms in which products are written: one rank for all, each its own rank, or PEFT's AdaLoRA."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import first
from tunerkit.plugin import ConfigError, Factors, FileError
from tunerkit_peft.from_adalora import EPSILON
from tunerkit_peft.pieces import Piece
from tunerkit_peft.places import INNER
from tunerkit_peft.selecting import pattern_for
from tunerkit_peft.stacks import packed

VERSION: Final = "0.21.2"  # of peft, whose format this is
# The greatest ranks that vLLM can be started for. A server that has room for one of them takes every lower rank too.
# The lowest, 1, is left out: TGI pads each layer type to 8 and then scales the next one by an eighth.
SERVED_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)


@attrs.frozen(eq=False)
class Written:
    """An adapter in one form.

    Attributes:
        settings: The settings of the form.
        tensors: The tensors by their names in the file, without PEFT's prefix.
        shared: Those that all targets share, without theirs.
    """

    settings: dict[str, object]
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor] = attrs.field(factory=dict)


def uniform(pieces: Sequence[Piece], rank: int | None) -> Written:
    """Pad all products with zeros to one rank R, with r = lora_alpha = R: the scale is 1, whoever computes it.

    Args:
        pieces: The products.
        rank: R; None for the lowest of `SERVED_RANKS` that fits, or the largest rank if none does.

    Raises:
        ConfigError: R is below the rank of a module.
    """
    largest = max(piece.rank for piece in pieces)
    if rank is not None and rank < largest:
        raise ConfigError([f"expected >= {largest}, the largest rank of a module, got {rank} @ $.rank"])
    chosen = rank or next((each for each in SERVED_RANKS if each >= largest), largest)
    return Written(
        {"r": chosen, "lora_alpha": chosen, "rank_pattern": {}, "alpha_pattern": {}},
        dict(_named(pieces, {piece.name: chosen for piece in pieces}, {})),
    )


def compact(pieces: Sequence[Piece]) -> Written:
    """Give each module its own rank k, and multiply P by k/R with lora_alpha = R, the largest rank.

    So PEFT's scale, R/k, gives the product back; vLLM from 0.32 on and llama.cpp compute the same scale. A module of
    rank 0 gets one row and one column of zeros: PEFT does not allow rank 0, and some servers leave out a kind of layer
    if one layer lacks it. PEFT gives both projections of attention one rank.
    """
    ranks: dict[str, int] = {}
    for piece in pieces:
        ranks[piece.owner] = max(ranks.get(piece.owner, 1), piece.rank)
    largest = max(ranks.values())
    owners = list(ranks)
    return Written(
        {
            "r": largest,
            "lora_alpha": largest,
            "rank_pattern": {pattern_for(owner, owners): k for owner, k in ranks.items() if k != largest},
            "alpha_pattern": {},
        },
        dict(
            _named(
                pieces,
                {piece.name: ranks[piece.owner] for piece in pieces},
                {piece.name: ranks[piece.owner] / largest for piece in pieces},
            )
        ),
    )


def adalora(pieces: Sequence[Piece], total_steps: int) -> Written:
    """Write the singular value decomposition of each product as PEFT's AdaLoRA.

    Args:
        pieces: The products.
        total_steps: The length of the training, which PEFT wants to know.

    Raises:
        FileError: PEFT's AdaLoRA does not adapt such a module.
    """
    _refuse_others(pieces)
    triplets = {piece.name: _decomposed(piece) for piece in pieces}
    ranks = {name: len(sigma) for name, (_, sigma, _) in triplets.items()}
    initial = max(1, *ranks.values())
    average = max(1, round(sum(ranks.values()) / len(ranks)))
    tensors = {}
    for name, (p, sigma, q) in triplets.items():
        # PEFT's scale is lora_alpha / (init_r + 1e-5), and lora_alpha = init_r.
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = q, p
        tensors[f"{name}.lora_E"] = (sigma * ((initial + EPSILON) / initial)).unsqueeze(1)
    return Written(
        {
            "peft_type": "ADALORA",
            "init_r": initial,
            "target_r": average,
            "r": average,
            "lora_alpha": initial,
            "total_step": max(1, total_steps),
            "rank_pattern": _masks(ranks, initial),
        },
        tensors,
    )


def _masks(ranks: Mapping[str, int], initial: int) -> dict[str, list[bool]] | None:
    if all(rank == initial for rank in ranks.values()):
        return None
    return {f"{name}.lora_E": [number < rank for number in range(initial)] for name, rank in ranks.items()}


def _named(
    pieces: Sequence[Piece], ranks: Mapping[str, int], scales: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    for piece in pieces:
        a, b = _padded(piece, ranks[piece.name])
        scale = scales.get(piece.name, 1.0)
        b = b if scale == 1 else b * scale
        if piece.stack is not None:
            a, b = packed(Factors(q=a, p=b), piece.stack, VERSION)
        if piece.embeds:
            yield from ((f"{piece.name}.lora_embedding_A", a), (f"{piece.name}.lora_embedding_B", b))
            continue
        if isinstance(piece.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kernel = piece.module.kernel_size
            a, b = a.reshape(len(a), -1, *kernel), b.reshape(*b.shape, *[1] * len(kernel))
        yield from ((f"{piece.name}.lora_A.weight", a), (f"{piece.name}.lora_B.weight", b))


def _padded(piece: Piece, rank: int) -> tuple[Tensor, Tensor]:
    """Add rows of zeros to Q and columns of zeros to P."""
    missing = rank - piece.rank
    if missing == 0:
        return piece.q, piece.p
    pad = torch.nn.functional.pad
    return pad(piece.q, (0, 0, 0, missing)), pad(piece.p, (0, missing))


def _decomposed(piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """P (out, k), λ (k,) and Q (k, in) with orthonormal columns and rows; what adds nothing is left out."""
    u, sigma, vh = Factors(q=piece.q, p=piece.p).triplets()
    kept = sigma > 0
    # Not in fp64 any longer: all modules together would take twice the memory.
    return u[:, kept].float(), sigma[kept], vh[kept].float()


def _refuse_others(pieces: Collection[Piece]) -> None:
    others = (nn.Embedding, nn.MultiheadAttention, nn.Conv1d, nn.Conv3d)
    if wrong := [
        f"{piece.name} ({type(piece.module).__name__})"
        if piece.stack is None
        else f"{piece.owner} (a stack of experts)"
        for piece in pieces
        if isinstance(piece.module, others) or piece.name.endswith(INNER) or piece.stack is not None
    ]:
        raise FileError(
            "\n- ".join(
                [
                    "PEFT's AdaLoRA adapts linear layers and Conv2d only; write a LoRA with form='uniform' or "
                    "form='compact', which keep the ranks:",
                    *first(wrong),
                ]
            )
        )
