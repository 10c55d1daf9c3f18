"""What a user sets for LoRA."""

from collections.abc import Iterable, Mapping
from typing import Literal

import attrs

from tunerkit import AdapterConfig, setting
from tunerkit.patterns import lookup


@attrs.frozen
class LoraConfig(AdapterConfig):
    """ΔW = scale · B A with A (r, in), B (out, r); scale = alpha/r, or alpha/√r with ``rslora`` (arXiv 2312.03732)."""

    rank: int = setting(8, ge=1, doc="columns of B and rows of A at each target")
    alpha: float | None = setting(None, gt=0, doc="numerator of the scale; None: twice the target's rank")
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the adapter's input that is dropped while training")
    rslora: bool = setting(False, doc="divide alpha by the root of the rank instead of the rank")
    rank_pattern: Mapping[str, int] = setting(
        attrs.Factory(dict), ge=1, doc="target pattern -> rank there; the first match counts"
    )
    alpha_pattern: Mapping[str, float] = setting(
        attrs.Factory(dict), gt=0, doc="target pattern -> alpha there; the first match counts"
    )
    start: Literal["kaiming", "gaussian"] = setting("kaiming", doc="how A starts; B starts at 0, so ΔW does too")

    def rank_at(self, path: str) -> int:
        """The rank at a target."""
        return lookup(self.rank_pattern, path, self.rank)

    def scale_at(self, path: str) -> float:
        """The scale at a target."""
        rank = self.rank_at(path)
        alpha = lookup(self.alpha_pattern, path, self.alpha)
        if alpha is None:
            alpha = 2.0 * rank
        return float(alpha / rank**0.5 if self.rslora else alpha / rank)

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        """Patterns that must each match a target, with the field they stand in."""
        yield from ((pattern, "rank_pattern") for pattern in self.rank_pattern)
        yield from ((pattern, "alpha_pattern") for pattern in self.alpha_pattern)
