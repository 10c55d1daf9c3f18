"""What a user sets for AdaLoRA."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import attrs

from tunerkit import AdapterConfig, setting
from tunerkit.patterns import lookup

DEFAULT_TARGET_RANK = 8
_EXCESS = 1.5  # of the initial rank over the one at the end
_LEAST_INIT_RANK = 8  # where triplets are turned
# The initial rank over the one at the end from above which triplets are turned: measured to help at 8 to 1 and to hurt
# at 8 to 4 and 12 to 8 (docs/quality-tried.md); between is a choice.
_TURNED_ABOVE = 2.0


@attrs.frozen
class AdaLoraConfig(AdapterConfig):
    """ΔW = (alpha/init_rank) · P Λ Q, pruned from ``init_rank`` at each target to one global budget.

    The budget is ``target_rank`` per target on average, or ``budget`` in total. Either is counted in ``budget_unit``:
    in parameters, ``target_rank`` is what so many triplets at each target have together, LoRA's size at that rank.
    ``t_init`` and ``t_final`` are optimizer steps (int) or shares of training (float below 1).
    """

    target_rank: int | None = setting(
        None, ge=1, doc="average rank per target at the end, or the size of that rank everywhere; None: 8, or by budget"
    )
    init_rank: int | None = setting(
        None, ge=1, doc="rank at each target at the start; None: 1.5 x target_rank, up, with exact_svd 8 at least"
    )
    alpha: float | None = setting(
        None,
        gt=0,
        doc="numerator of the scale; None: 2 init_rank, with exact_svd 2 target_rank (or 4/3 init_rank)",
    )
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the adapter's input that is dropped while training")
    t_init: int | float = setting(0.1, ge=0, doc="t_i: no pruning before")
    t_final: int | float = setting(0.3, ge=0, doc="t_f: length of the final phase, ranks fixed")
    delta_t: int = setting(10, ge=1, doc="Δ_T: steps between allocations")
    # Not 0: then Ī = I, so U = |I − Ī| and with it every score would be 0, and triplets would go by position.
    beta1: float = setting(0.85, gt=0, lt=1, doc="β1: smoothing of the sensitivity (Eq. 9)")
    beta2: float = setting(0.85, ge=0, lt=1, doc="β2: smoothing of the uncertainty (Eq. 10)")
    gamma: float = setting(0.0, ge=0, doc="γ: weight of the orthogonality regulariser; 0 switches it off")
    orthogonality: Literal["reference", "paper"] = setting(
        "reference", doc="form of the regulariser: mean of norms (the public codes) or sum of squared norms (the paper)"
    )
    exact_svd: bool | None = setting(
        None,
        doc="make P Λ Q the SVD of ΔW at each allocation; None: where over half of the triplets are to go by "
        "target_rank, start is 'lora' and gamma 0",
    )
    train_lambda: bool | None = setting(
        None, doc="let the optimizer move Λ too; None: unless exact_svd, which sets it, is on and start is 'lora'"
    )
    total_steps: int | None = setting(None, ge=1, doc="T, if attach or the Trainer should not say it")
    budget: int | None = setting(None, ge=1, doc="total budget at the end, in budget_unit; instead of target_rank")
    budget_unit: Literal["rank", "parameters"] = setting(
        "rank", doc="what the budget counts: triplets or their parameters"
    )
    min_rank: int | Mapping[str, int] = setting(0, ge=0, doc="least rank at a target; a mapping goes by target pattern")
    max_rank: int | Mapping[str, int] | None = setting(
        None, ge=0, doc="greatest rank at a target at the end; a mapping goes by target pattern"
    )
    shrink: bool = setting(True, doc="once the ranks are final, let dead triplets leave memory")
    start: Literal["lora", "gaussian", "orthonormal"] = setting(
        "lora", doc="P = 0, Λ = 1, Q as LoRA's A; or Λ = 0 with Gaussian (the paper's) or orthonormal P and Q"
    )

    @classmethod
    def paper(cls, **settings: Any) -> Self:
        """The paper's method as its authors ran it on MNLI, QQP, SST-2 and SQuAD; ``settings`` go over it.

        N(0, 0.02) for P and Q and Λ = 0, α = 16, γ = 0.1 with the form that their code has. Their other scripts say an
        α of 32, for RTE and STS-B a γ of 0.3. On GLUE t_i is 0.09 to 0.18 and t_f 0.44 to 0.58 of training, with an
        allocation every 100 steps, or every 10 or at each where training is short.
        """
        defaults = {"start": "gaussian", "alpha": 16.0, "gamma": 0.1, "orthogonality": "reference", "t_final": 0.5}
        return cls(**{**defaults, **settings})

    @classmethod
    def peft(cls, **settings: Any) -> Self:
        """What `peft.AdaLoraConfig` has by default; ``settings`` go over it.

        As the paper starts, but α = 8 over an initial rank of 12, γ = 0.5, and an allocation at every step of training.
        """
        defaults = {"start": "gaussian", "init_rank": 12, "alpha": 8.0, "gamma": 0.5, "orthogonality": "reference"}
        return cls(**{**defaults, "t_init": 0, "t_final": 0, "delta_t": 1, **settings})

    @property
    def initial_rank(self) -> int:
        """``init_rank``, or what it is by default."""
        if self.init_rank is not None:
            return self.init_rank
        return max(math.ceil(_EXCESS * self.average_rank), _LEAST_INIT_RANK if self.in_svd_form else 0)

    @property
    def average_rank(self) -> int:
        """``target_rank``, or what it is by default."""
        return self.target_rank if self.target_rank is not None else DEFAULT_TARGET_RANK

    @property
    def scale(self) -> float:
        """The factor of P Λ Q. It uses the initial rank and does not change with pruning.

        In SVD form λ adds up to the initial rank at each target, so that the scales of all its triplets add up to
        alpha: by default to what they do in LoRA with the rank that is left.
        """
        return self._alpha / self.initial_rank

    @property
    def in_svd_form(self) -> bool:
        """``exact_svd``, or what it is by default: the penalty and a start at Λ = 0 are the paper's own ways."""
        if self.exact_svd is not None:
            return self.exact_svd
        return self.start == "lora" and self.gamma == 0 and self._loses_most

    @property
    def trains_lambda(self) -> bool:
        """``train_lambda``, or what it is by default."""
        if self.train_lambda is not None:
            return self.train_lambda
        return not self.in_svd_form or self.start != "lora"

    @property
    def _loses_most(self) -> bool:
        """Whether over half of the triplets go, which a total budget does not say before the targets are known.

        By the initial rank that turned triplets would have: what it is by default depends on whether they are.
        """
        initial = self.init_rank if self.init_rank is not None else _LEAST_INIT_RANK
        return self.budget is None and initial > _TURNED_ABOVE * self.average_rank

    @property
    def _alpha(self) -> float:
        if self.alpha is not None:
            return self.alpha
        if not self.in_svd_form:
            return 2.0 * self.initial_rank
        # What a total budget leaves of the rank is known once the targets are: taken for what it is by default.
        return 2.0 * (self.average_rank if self.budget is None else self.initial_rank / _EXCESS)

    def settled(self) -> Self:
        """With its ranks, scale and treatment of Λ written out."""
        return attrs.evolve(
            self,
            target_rank=self.average_rank if self.budget is None else None,
            init_rank=self.initial_rank,
            alpha=self._alpha,
            exact_svd=self.in_svd_form,
            train_lambda=self.trains_lambda,
        )

    def minimum_at(self, path: str) -> int:
        """The least rank at a target."""
        return lookup(self.min_rank, path, 0) if isinstance(self.min_rank, Mapping) else self.min_rank

    def maximum_at(self, path: str) -> int:
        """The greatest rank at a target."""
        if isinstance(self.max_rank, Mapping):
            return lookup(self.max_rank, path, self.initial_rank)
        return self.initial_rank if self.max_rank is None else self.max_rank

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        """Patterns that must each match a target, with the field they stand in."""
        for field in ("min_rank", "max_rank"):
            bounds = getattr(self, field)
            if isinstance(bounds, Mapping):
                yield from ((pattern, field) for pattern in bounds)

    def problems(self) -> Iterable[str]:
        """What is wrong across fields."""
        if self.budget is not None and self.target_rank is not None:
            yield "target_rank and budget both say how much is left at the end; give one @ $.budget"
        if self.budget is not None and self.init_rank is None:
            yield "a total budget needs init_rank, the rank at each target at the start @ $.init_rank"
        if self.budget is None and self.average_rank > self.initial_rank:
            yield (
                f"target_rank {self.average_rank} is above init_rank {self.initial_rank}: the budget only falls; "
                "raise init_rank @ $.target_rank"
            )
        if self.exact_svd and self.gamma > 0:
            yield (
                f"gamma {self.gamma} pulls P and Q to length 1, which exact_svd gives lengths of their own; set gamma "
                "to 0, or exact_svd to False @ $.gamma"
            )
        if self.start != "lora" and not self.trains_lambda:
            yield (
                f"start {self.start!r} begins with Λ = 0, where nothing is learnt until Λ moves; set train_lambda to "
                "True, or start to 'lora' @ $.train_lambda"
            )
        yield from self._span_problems()
        if isinstance(self.min_rank, int) and self.min_rank > self.initial_rank:
            yield f"min_rank {self.min_rank} is above init_rank {self.initial_rank} @ $.min_rank"
        if isinstance(self.min_rank, int) and isinstance(self.max_rank, int) and self.min_rank > self.max_rank:
            yield f"min_rank {self.min_rank} is above max_rank {self.max_rank} @ $.min_rank"

    def _span_problems(self) -> Iterable[str]:
        spans = {"t_init": self.t_init, "t_final": self.t_final}
        wrong = [field for field, value in spans.items() if isinstance(value, float) and value >= 1]
        for field in wrong:
            yield f"expected steps (int) or a share of training (float below 1), got {spans[field]} @ $.{field}"
        shares = [value for value in spans.values() if isinstance(value, float)]
        if not wrong and sum(shares) >= 1:
            yield f"t_init {self.t_init} + t_final {self.t_final} leave no training to prune in; lower one @ $.t_init"
