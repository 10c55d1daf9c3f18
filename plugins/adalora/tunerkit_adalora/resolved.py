"""The settings whose defaults depend on other settings, resolved."""

import math

import attrs

# Where P = 0 and Λ = 1, so that Λ need not move.
STARTS_AT_P_0 = ("lora", "eva", "gradients")
_DEFAULT_TARGET_RANK = 8
_EXCESS = 1.5  # initial rank over target rank
_LEAST_SVD_RANK = 8  # initial rank in SVD form
# SVD form is the default where the initial rank is more than this many times the target rank. It was measured to help
# at 8 to 1, and to hurt at 8 to 4 and 12 to 8 (docs/evidence/quality-tried.md). The ratio in between is a choice.
_SVD_ABOVE = 2.0


@attrs.frozen
class Resolved:
    """What the config's optional settings mean once their defaults are applied.

    The names are those of the config's fields; ``None`` no longer occurs.

    Attributes:
        target_rank: Average rank per target at the end of training. A total budget replaces it.
        init_rank: Triplets at each target at the start.
        alpha: Numerator of the scale.
        exact_svd: Whether each allocation makes P Λ Q the SVD of ΔW.
        train_lambda: Whether the optimizer moves Λ.
    """

    target_rank: int
    init_rank: int
    alpha: float
    exact_svd: bool
    train_lambda: bool

    @property
    def scale(self) -> float:
        """The factor of P Λ Q: alpha/init_rank. It does not change with pruning.

        The scales of all triplets add up to alpha at the start and, in SVD form, where λ adds up to ``init_rank``, for
        good. By default that is what they add up to in LoRA with the rank that is left, if ``init_rank`` is at most 1.5
        times that rank: an optimizer's step then moves ΔW as far as LoRA's, and a training collapses at LoRA's learning
        rate, not below it.
        """
        return self.alpha / self.init_rank


def resolve(
    *,
    target_rank: int | None,
    init_rank: int | None,
    alpha: float | None,
    exact_svd: bool | None,
    train_lambda: bool | None,
    budget: int | None,
    gamma: float,
    start: str,
) -> Resolved:
    """Apply the defaults that depend on other settings.

    Args:
        target_rank: The config's field; None means 8.
        init_rank: The config's field; None means 1.5 target_rank, rounded up, and at least 8 in SVD form.
        alpha: The config's field; None means twice the rank that is left at the end, as in LoRA; with a ``budget``,
            init_rank / 1.5 stands for that rank. Without SVD form it is at least 4/3 of init_rank, since the triplets
            that are left keep their scale.
        exact_svd: The config's field; None means yes if more than half of the triplets are pruned, unless the config
            asks for the paper's own means: the penalty, or a start at Λ = 0. With a ``budget`` None means no: it does
            not say how many are pruned before the targets are known.
        train_lambda: The config's field; None means yes, unless SVD form sets Λ and Λ does not start at 0.
        budget: Total budget at the end, or None.
        gamma: γ, the weight of the penalty.
        start: How P, Λ and Q start.

    Returns:
        The resolved settings.
    """
    average = _DEFAULT_TARGET_RANK if target_rank is None else target_rank
    if exact_svd is None:
        exact_svd = start in STARTS_AT_P_0 and gamma == 0 and _prunes_most(init_rank, average, budget)
    if init_rank is None:
        init_rank = max(math.ceil(_EXCESS * average), _LEAST_SVD_RANK if exact_svd else 0)
    if alpha is None:
        left = _rank_left(init_rank, average, budget)
        alpha = 2.0 * (left if exact_svd else max(left, init_rank / _EXCESS))
    if train_lambda is None:
        train_lambda = not exact_svd or start not in STARTS_AT_P_0
    return Resolved(average, init_rank, alpha, exact_svd, train_lambda)


def _prunes_most(init_rank: int | None, average: int, budget: int | None) -> bool:
    """Whether over half of the triplets go; a total budget does not say so before the targets are known.

    Without an ``init_rank``, compare the one that SVD form would have: the default depends on this very answer.
    """
    initial = _LEAST_SVD_RANK if init_rank is None else init_rank
    return budget is None and initial > _SVD_ABOVE * average


def _rank_left(init_rank: int, average: int, budget: int | None) -> float:
    """The average rank at the end. With a total budget it depends on the targets: assume the default ratio."""
    return average if budget is None else init_rank / _EXCESS
