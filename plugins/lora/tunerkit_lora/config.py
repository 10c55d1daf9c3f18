"""The settings of LoRA."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, Self

import attrs

from tunerkit.plugin import AdapterConfig, StatisticsRequest, exact_patterns, lookup, setting

# Measured directions per used one, and the minimum: the last directions of an approximation are inaccurate.
_EXCESS, _LEAST = 4, 64


@attrs.frozen
class LoraConfig(AdapterConfig):
    """The settings of LoRA: ΔW = scale · B A, with A (r, in) and B (out, r).

    The scale is alpha/r, or alpha/√r with ``rslora`` (arXiv 2312.03732). The ``doc`` of each field explains it.

    Raises:
        ConfigError: Some fields are invalid; the error lists every problem.
    """

    rank: int = setting(8, ge=1, doc="rows of A and columns of B", aka=("r",))
    alpha: float | None = setting(
        None, gt=0, doc="numerator of the scale; None means twice the target's rank", aka=("lora_alpha",)
    )
    dropout: float = setting(
        0.0, ge=0, lt=1, doc="share of the adapter's input that is dropped in training", aka=("lora_dropout",)
    )
    rslora: bool = setting(False, doc="divide alpha by the root of the rank instead of the rank", aka=("use_rslora",))
    rank_pattern: Mapping[str, int] = setting(
        attrs.Factory(dict), ge=0, doc="maps a target pattern to a rank; the first match counts; 0 adds nothing"
    )
    alpha_pattern: Mapping[str, float] = setting(
        attrs.Factory(dict), gt=0, doc="maps a target pattern to an alpha; the first match counts"
    )
    start: Literal["kaiming", "gaussian", "pissa", "olora", "eva", "gradients", "loftq"] = setting(
        "kaiming",
        doc="where A and B start, with ΔW = 0: A at random (kaiming, gaussian), parts of W (pissa, olora), or what "
        "tunerkit.calibrate finds in the inputs (eva) or gradients; loftq adds what quantising W has lost",
        aka=("init_lora_weights",),
    )
    rho: float | None = setting(
        None,
        ge=1,
        doc="calibrate moves ranks between targets, up to rho times a target's own; None: 2 with start 'eva', else 1: "
        "no move",
        aka=("eva_config",),
    )
    lr_ratio: float = setting(
        1.0, gt=0, doc="learning rate of B as a multiple of A's, as in LoRA+", aka=("loraplus_lr_ratio",)
    )

    def rank_at(self, path: str) -> int:
        """Return the rank at a target.

        Args:
            path: The target's dotted path.
        """
        return lookup(self.rank_pattern, path, self.rank)

    original: str | None = setting(
        None,
        doc="folder or safetensors file with the base's weights before they were quantised, for start 'loftq'",
        aka=("loftq_config",),
    )

    @property
    def most(self) -> float:
        """The largest factor by which `tunerkit.calibrate` may raise a target's rank: ``rho``, or its default."""
        return self.rho or (2.0 if self.start == "eva" else 1.0)

    def request(self) -> StatisticsRequest | None:
        """Return the statistics that the initialization needs, or None."""
        if self.start not in ("eva", "gradients"):
            return None
        most = math.ceil(self.most * max(self.rank, *self.rank_pattern.values(), 1))
        if self.start == "eva":
            return StatisticsRequest(inputs=max(_EXCESS * most, _LEAST))
        return StatisticsRequest(gradients=max(2 * most, _LEAST // 2))

    @classmethod
    def of_ranks(cls, ranks: Mapping[str, int]) -> Self:
        """Return a config with exactly these targets and ranks, for adapters that are built from products.

        Args:
            ranks: The rank at each target, by its path; it may be 0.
        """
        ((common, _),) = Counter(ranks.values()).most_common(1)
        names = exact_patterns(ranks)
        pattern = {names[path]: rank for path, rank in ranks.items() if rank != max(1, common)}
        return cls(rank=max(1, common), rank_pattern=pattern, targets=tuple(names.values()))

    def scale_at(self, path: str) -> float:
        """Return the scale at a target.

        Args:
            path: The target's dotted path.
        """
        rank = self.rank_at(path) or 1  # at rank 0 the scale has no effect
        alpha = lookup(self.alpha_pattern, path, self.alpha)
        if alpha is None:
            alpha = 2.0 * rank
        return float(alpha / rank**0.5 if self.rslora else alpha / rank)

    def problems(self) -> Iterable[str]:
        """Yield conflicts between fields."""
        if self.rho is not None and self.start not in ("eva", "gradients"):
            yield f"rho needs data to move ranks, and start {self.start!r} uses none; set start to 'eva' @ $.rho"
        if self.original is not None and self.start != "loftq":
            yield f"start {self.start!r} does not read the original weights; set start to 'loftq' @ $.original"

    def settled(self) -> Self:
        """Drop the path of the original weights, which loading does not need."""
        return attrs.evolve(self, original=None)

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        """Yield (pattern, field) for all patterns, each of which must match a target."""
        yield from ((pattern, "rank_pattern") for pattern in self.rank_pattern)
        yield from ((pattern, "alpha_pattern") for pattern in self.alpha_pattern)
