"""The settings of AdaLoRA."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import attrs

from tunerkit.plugin import AdapterConfig, StatisticsRequest, setting

# Where P = 0 and Λ = 1, so that Λ need not move.
_STARTS_AT_P_0 = ("lora", "eva", "gradients")
_DEFAULT_TARGET_RANK = 8
_EXCESS = 1.5  # initial rank over target rank
_LEAST_SVD_RANK = 8  # initial rank in SVD form
# Measured directions per triplet, and the minimum: the last directions of an approximation are inaccurate.
_DIRECTIONS, _LEAST_DIRECTIONS = 4, 64
# SVD form is the default where the initial rank is more than this many times the target rank. It was measured to help
# at 8 to 1, and to hurt at 8 to 4 and 12 to 8 (docs/evidence/quality-tried.md). The ratio in between is a choice.
_SVD_ABOVE = 2.0


@attrs.frozen
class Resolved:
    """The config's optional settings with all defaults filled in, under the same names.

    Attributes:
        target_rank: Average rank per target at the end of training. A total budget replaces it.
        init_rank: The number of triplets at each target at the start.
        alpha: Numerator of the scale.
        exact_svd: Whether each allocation makes P Λ Q the SVD of ΔW.
        train_lambda: Whether the optimizer updates Λ.
    """

    target_rank: int
    init_rank: int
    alpha: float
    exact_svd: bool
    train_lambda: bool

    @property
    def scale(self) -> float:
        """The factor of P Λ Q: alpha/init_rank. It does not change with pruning.

        If λ starts at 1, scale · λ sums to alpha over a target's triplets; in SVD form it stays so, because λ sums to
        ``init_rank``. With the default alpha, and ``init_rank`` at most 1.5 times the final rank, LoRA of the final
        rank has the same sum. An optimizer's step then changes ΔW as much as in LoRA, so the learning rate at which
        training diverges is LoRA's, and not lower.
        """
        return self.alpha / self.init_rank


@attrs.frozen
class AdaLoraConfig(AdapterConfig):
    """ΔW = (alpha/init_rank) · P Λ Q, pruned from ``init_rank`` at each target to one global budget.

    The budget is ``target_rank`` per target on average, or ``budget`` in total. ``budget_unit`` is its unit: ranks or
    parameters. In parameters, a ``target_rank`` of r is the size of r triplets at each target, as in LoRA of rank r.
    Each matrix of a stack, such as an expert, counts as a target of its own here, and for ``min_rank`` and
    ``max_rank``. ``t_init`` and ``t_final`` are optimizer steps (int) or shares of training (float below 1).
    """

    target_rank: int | None = setting(
        None,
        ge=1,
        doc="average rank per target at the end, or the size of that rank everywhere; None: 8, or by budget",
        aka=("target_r", "r", "rank"),
    )
    init_rank: int | None = setting(
        None,
        ge=1,
        doc="rank at each target at the start; None: 1.5 target_rank, rounded up, with exact_svd at least 8",
        aka=("init_r",),
    )
    alpha: float | None = setting(
        None,
        gt=0,
        doc="numerator of the scale; None: 2 target_rank, without exact_svd (or with a budget) at least 4/3 init_rank",
        aka=("lora_alpha",),
    )
    dropout: float = setting(
        0.0, ge=0, lt=1, doc="share of the adapter's input that is dropped while training", aka=("lora_dropout",)
    )
    t_init: int | float = setting(0.1, ge=0, doc="t_i: no pruning before", aka=("tinit",))
    t_final: int | float = setting(0.3, ge=0, doc="t_f: length of the final phase, ranks fixed", aka=("tfinal",))
    delta_t: int = setting(10, ge=1, doc="Δ_T: steps between allocations", aka=("deltaT",))
    # Not 0: then Ī = I, so U = |I − Ī| and every score would be 0, and triplets would be ranked by position.
    beta1: float = setting(0.85, gt=0, lt=1, doc="β1: smoothing of the sensitivity (Eq. 9)")
    beta2: float = setting(0.85, ge=0, lt=1, doc="β2: smoothing of the uncertainty (Eq. 10)")
    gamma: float = setting(
        0.0, ge=0, doc="γ: weight of the orthogonality regulariser; 0 switches it off", aka=("orth_reg_weight",)
    )
    orthogonality: Literal["reference", "paper"] = setting(
        "reference", doc="form of the regulariser: mean of norms (the public codes) or sum of squared norms (the paper)"
    )
    exact_svd: bool | None = setting(
        None,
        doc="make P Λ Q the SVD of ΔW at each allocation; None: yes if target_rank prunes over half of the triplets, "
        "P starts at 0 and gamma is 0",
    )
    train_lambda: bool | None = setting(
        None, doc="let the optimizer move Λ too; None: unless exact_svd, which sets it, is on and P starts at 0"
    )
    total_steps: int | None = setting(
        None, ge=1, doc="T, if attach or the Trainer should not say it", aka=("total_step",)
    )
    budget: int | None = setting(None, ge=1, doc="total budget at the end, in budget_unit; instead of target_rank")
    budget_unit: Literal["rank", "parameters"] = setting(
        "rank", doc="what the budget counts: triplets or their parameters"
    )
    min_rank: int | Mapping[str, int] = setting(
        0, ge=0, doc="least rank at a target; a mapping from target pattern to rank also works"
    )
    max_rank: int | Mapping[str, int] | None = setting(
        None, ge=0, doc="greatest rank at a target at the end; a mapping from target pattern to rank also works"
    )
    shrink: bool = setting(
        True,
        doc="once the ranks are final, remove dead triplets from memory; never in an adapter with stacks of experts",
    )
    start: Literal["lora", "gaussian", "orthonormal", "eva", "gradients"] = setting(
        "lora",
        doc="P = 0, Λ = 1, Q as LoRA's A, or what tunerkit.calibrate finds in the inputs (eva) or gradients; or Λ = 0 "
        "with Gaussian (the paper's) or orthonormal P and Q",
        aka=("init_lora_weights",),
    )

    @classmethod
    def paper(cls, **settings: Any) -> Self:
        """Return the settings with which the paper's authors ran MNLI, QQP, SST-2 and SQuAD.

        P and Q start as N(0, 0.02) and Λ = 0; α = 16; γ = 0.1 with the form that their code has. Their other scripts
        use α = 32, and γ = 0.3 for RTE and STS-B. On GLUE t_i is 0.09 to 0.18 and t_f 0.44 to 0.58 of training. Δ_T is
        100 steps, or 10 or 1 where training is short.

        Args:
            **settings: Fields of the config; they take precedence.

        Returns:
            The config.
        """
        defaults = {"start": "gaussian", "alpha": 16.0, "gamma": 0.1, "orthogonality": "reference", "t_final": 0.5}
        return cls(**{**defaults, **settings})

    @classmethod
    def peft(cls, **settings: Any) -> Self:
        """Return the default settings of `peft.AdaLoraConfig`.

        Initial values are as in the paper. α = 8 over an initial rank of 12, γ = 0.5, and an allocation at every step.

        Args:
            **settings: Fields of the config; they take precedence.

        Returns:
            The config.
        """
        defaults = {"start": "gaussian", "init_rank": 12, "alpha": 8.0, "gamma": 0.5, "orthogonality": "reference"}
        return cls(**{**defaults, "t_init": 0, "t_final": 0, "delta_t": 1, **settings})

    def resolved(self) -> Resolved:
        """Apply the defaults that depend on other settings.

        Returns:
            The effective settings, with all defaults filled in. ``target_rank`` is 8. ``exact_svd`` is on if more than
            half of the triplets are pruned, unless the config asks for the paper's own means: the penalty, or a start
            at Λ = 0. With a ``budget`` it is off, since the share of pruned triplets depends on the targets.
            ``init_rank`` is 1.5 target_rank, rounded up, and at least 8 in SVD form. ``alpha`` is twice the final
            average rank, as in LoRA; with a ``budget``, init_rank / 1.5 stands for that rank. Without SVD form it is at
            least 4/3 of init_rank, since the remaining triplets keep their scale. ``train_lambda`` is off if SVD form
            sets Λ and Λ starts at 1, else on.
        """
        average = _DEFAULT_TARGET_RANK if self.target_rank is None else self.target_rank
        init_rank, alpha, exact_svd, train_lambda = self.init_rank, self.alpha, self.exact_svd, self.train_lambda
        if exact_svd is None:
            # Without an init_rank, compare the one of SVD form: the default depends on this very answer.
            prunes_most = (_LEAST_SVD_RANK if init_rank is None else init_rank) > _SVD_ABOVE * average
            exact_svd = self.start in _STARTS_AT_P_0 and self.gamma == 0 and self.budget is None and prunes_most
        if init_rank is None:
            init_rank = max(math.ceil(_EXCESS * average), _LEAST_SVD_RANK if exact_svd else 0)
        if alpha is None:
            left = average if self.budget is None else init_rank / _EXCESS
            alpha = 2.0 * (left if exact_svd else max(left, init_rank / _EXCESS))
        if train_lambda is None:
            train_lambda = not exact_svd or self.start not in _STARTS_AT_P_0
        return Resolved(average, init_rank, alpha, exact_svd, train_lambda)

    @property
    def initial_rank(self) -> int:
        """``init_rank``, or its default."""
        return self.resolved().init_rank

    @property
    def scale(self) -> float:
        """The factor of P Λ Q. It uses the initial rank, and does not change with pruning."""
        return self.resolved().scale

    @property
    def in_svd_form(self) -> bool:
        """``exact_svd``, or its default."""
        return self.resolved().exact_svd

    def request(self) -> StatisticsRequest | None:
        """Return the statistics that the initialization needs; None if it needs no data."""
        if self.start not in ("eva", "gradients"):
            return None
        most = max(_DIRECTIONS * self.initial_rank, _LEAST_DIRECTIONS)
        return StatisticsRequest(inputs=most) if self.start == "eva" else StatisticsRequest(gradients=most // 2)

    def settled(self) -> Self:
        """Make the resolved settings explicit: files store them, so that new defaults do not change an adapter.

        Returns:
            A config that resolves to the same settings.
        """
        settings = attrs.asdict(self.resolved())
        # ``budget`` and ``target_rank`` would both set the final budget.
        return attrs.evolve(self, **settings if self.budget is None else {**settings, "target_rank": None})

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        """Yield (pattern, field) for patterns that must each match a target."""
        for field, bound in (("min_rank", self.min_rank), ("max_rank", self.max_rank)):
            if isinstance(bound, Mapping):
                yield from ((pattern, field) for pattern in bound)

    def problems(self) -> Iterable[str]:
        """Yield conflicts between fields."""
        used = self.resolved()
        if self.budget is not None and self.target_rank is not None:
            yield "target_rank and budget both set the final budget; give only one @ $.budget"
        if self.budget is not None and self.init_rank is None:
            yield "a total budget needs init_rank, the rank at each target at the start @ $.init_rank"
        if self.budget is None and used.target_rank > used.init_rank:
            yield (
                f"target_rank {used.target_rank} is above init_rank {used.init_rank}: the budget only falls; "
                "raise init_rank @ $.target_rank"
            )
        if self.exact_svd and self.gamma > 0:
            yield (
                f"gamma {self.gamma} pulls P and Q to length 1, but exact_svd gives them other lengths; set gamma to "
                "0, or exact_svd to False @ $.gamma"
            )
        if self.start not in _STARTS_AT_P_0 and not used.train_lambda:
            yield (
                f"start {self.start!r} begins with Λ = 0, so P and Q get no gradients until Λ is trained; set "
                "train_lambda to True, or start to 'lora' @ $.train_lambda"
            )
        yield from self._span_problems()
        if isinstance(self.min_rank, int) and self.min_rank > used.init_rank:
            yield f"min_rank {self.min_rank} is above init_rank {used.init_rank} @ $.min_rank"
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
