"""A PEFT AdaLoRA as tunerkit's: ΔW = (alpha/init_rank) · P Λ Q, with the rank of each module."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from tunerkit.plugin import Factors, low_rank_factors
from tunerkit_peft.adapter_config import Settings
from tunerkit_peft.parts import Parts, matrices, refuse_ranks
from tunerkit_peft.places import place_of
from tunerkit_peft.products import Lazy, Read
from tunerkit_peft.weights import Weights

EPSILON: Final = 1e-5  # PEFT divides by the rank plus this
_LAMBDA: Final = ".lora_E"


def read_adalora(settings: Settings, weights: Weights, parts: Sequence[Parts]) -> Read:
    """Read the adapter. PEFT's scale, alpha/(init_r + 1e-5), goes into λ where it differs from tunerkit's.

    With an alpha of 0 or less PEFT takes the rank that a module has when it is loaded in place of alpha.

    Args:
        settings: The adapter's settings.
        weights: Its tensors.
        parts: What is at each module.

    Raises:
        FileError: A rank has no explanation in the settings.
    """
    expected = _expected(settings)
    refuse_ranks(
        settings,
        weights,
        [
            f"{each.names['A']} has rank {each.rank}; 'init_r' and 'rank_pattern' say {wanted}"
            for each in parts
            if each.rank != (wanted := expected.get(each.place.owner, settings.rank))
        ],
    )
    initial = settings.rank
    alpha = settings.alpha if settings.alpha > 0 else float(initial)
    tensors = {each.place.path: _tensors(settings, weights, each) for each in parts}
    return Read(
        factors=Lazy({path: _Product(own, alpha / initial) for path, own in tensors.items()}),
        config=_config(settings, alpha),
        tensors=tensors,
    )


class _Product:
    """Computes the product of one module."""

    def __init__(self, own: Mapping[str, Tensor], scale: float) -> None:
        self._own, self._scale = own, scale

    def __call__(self) -> Factors:
        return low_rank_factors(self._own["q"], self._own["p"], lam=self._own["lam"], scale=self._scale)


def _tensors(settings: Settings, weights: Weights, parts: Parts) -> dict[str, Tensor]:
    a, b = matrices(weights, parts)
    numerator = settings.rank if settings.alpha > 0 else parts.rank
    # Over the initial rank, tunerkit's own divisor, this is PEFT's scale.
    lam = weights.matrix(parts.names["E"]).squeeze(1) * (numerator / (settings.rank + EPSILON))
    return {"p": b, "lam": lam, "q": a, "mask": torch.ones(parts.rank, dtype=torch.bool)}


def _expected(settings: Settings) -> dict[str, int]:
    """The rank of each module that ``rank_pattern`` names: ``path.lora_E``, or with an adapter's name after it."""
    live = settings.live or {}
    return {place_of(name.rpartition(_LAMBDA)[0], str).owner: rank for name, rank in live.items() if _LAMBDA in name}


def _config(settings: Settings, alpha: float) -> dict[str, object]:
    """The settings of `tunerkit_adalora`. Steps become shares of training: the next one has another length."""
    own = settings.schedule
    total = own.total_step if own.tinit + own.tfinal < own.total_step else 0
    return {
        "init_rank": settings.rank,
        "target_rank": min(own.target_r, settings.rank),
        "alpha": alpha,
        "dropout": settings.dropout,
        "t_init": own.tinit / total if total else 0.0,
        "t_final": own.tfinal / total if total else 0.0,
        "delta_t": own.delta_t,
        **({"beta1": own.beta1} if own.beta1 > 0 else {}),  # at 0 every score is 0
        "beta2": own.beta2,
        "gamma": own.orth_reg_weight,
        "orthogonality": "reference",
        "start": "gaussian",
    }
