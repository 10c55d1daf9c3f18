"""LoRA's hook implementations."""

from collections.abc import Iterable, Mapping

from tunerkit.plugin import BaseLayer, Factors, Method, Target, hookimpl
from tunerkit_lora.adapter import LoraAdapter, adapter_of
from tunerkit_lora.config import LoraConfig


@hookimpl
def tunerkit_methods() -> Iterable[Method]:
    """Register the method."""
    return [Method(name="lora", config=LoraConfig)]


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: LoraConfig) -> LoraAdapter:
    """Build the adapter at one target."""
    return LoraAdapter(
        in_features=base.in_features,
        out_features=base.out_features,
        rank=config.rank_at(target.path),
        scale=config.scale_at(target.path),
        dropout=config.dropout,
        start=config.start,
    )


@hookimpl
def tunerkit_factors(adapter: LoraAdapter) -> Factors:
    """Return what the adapter adds to the weight, for merging and conversion."""
    return adapter.factors()


@hookimpl
def tunerkit_from_factors(factors: Mapping[str, Factors]) -> tuple[LoraConfig, Mapping[str, LoraAdapter]]:
    """Build the config and the adapters that add given products."""
    config = LoraConfig.of_ranks({path: product.rank for path, product in factors.items()})
    return config, {path: adapter_of(product, scale=config.scale_at(path)) for path, product in factors.items()}
