"""LoRA's hook implementations."""

from collections.abc import Iterable

from tunerkit import BaseLayer, Delta, Method, Target, hookimpl, low_rank_delta
from tunerkit_lora.adapter import LoraAdapter
from tunerkit_lora.config import LoraConfig


@hookimpl
def tunerkit_methods() -> Iterable[Method]:
    """Register the method."""
    return [Method(name="lora", config=LoraConfig)]


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: LoraConfig) -> LoraAdapter:
    """Build the adapter at one target."""
    return LoraAdapter(
        base,
        rank=config.rank_at(target.path),
        scale=config.scale_at(target.path),
        dropout=config.dropout,
        start=config.start,
    )


@hookimpl
def tunerkit_delta(adapter: LoraAdapter, base: BaseLayer) -> Delta:
    """Return what the adapter adds to the weight, for merging."""
    return Delta(weight=low_rank_delta(base, q=adapter.a, p=adapter.b, scale=adapter.scale))
