"""LoRA's hook implementations."""

from collections.abc import Iterable, Mapping

from torch.optim import Optimizer

from tunerkit.plugin import BaseLayer, Factors, Method, ParamGroup, Statistics, Target, Tuner, hookimpl
from tunerkit_lora import fitting, rates, starts
from tunerkit_lora.adapter import LoraAdapter, adapter_of
from tunerkit_lora.config import LoraConfig
from tunerkit_lora.subtracted import SubtractedLora


@hookimpl
def tunerkit_methods() -> Iterable[Method]:
    """Register the method."""
    return [Method(name="lora", config=LoraConfig, statistics=LoraConfig.request, stacks=True)]


@hookimpl
def tunerkit_build_adapter(
    target: Target, base: BaseLayer, config: LoraConfig, loading: bool
) -> LoraAdapter | SubtractedLora:
    """Build the adapter at one target."""
    return starts.build(target.path, base, config, loading=loading)


@hookimpl
def tunerkit_calibrate(
    tuner: Tuner, statistics: Mapping[str, Statistics], bases: Mapping[str, BaseLayer]
) -> Mapping[str, int] | None:
    """Initialize adapters and ranks from data."""
    return fitting.fit_(tuner, statistics, bases)


@hookimpl
def tunerkit_start(tuner: Tuner, optimizer: Optimizer | None) -> None:
    """Reject an adapter whose start needs data and was not calibrated; warn if the optimizer ignores ``lr_ratio``."""
    assert isinstance(tuner.config, LoraConfig)
    if tuner.config.request() is not None:
        fitting.refuse_unfitted(tuner)
    if optimizer is not None and tuner.config.lr_ratio != 1:
        rates.warn_of_others(tuner, optimizer)


@hookimpl
def tunerkit_param_groups(tuner: Tuner) -> list[ParamGroup]:
    """LoRA+: a separate learning rate for B (Hayou et al., arXiv 2402.12354)."""
    assert isinstance(tuner.config, LoraConfig)
    ratio = tuner.config.lr_ratio
    return [] if ratio == 1 else [ParamGroup(fitting.all_b(tuner), lr_scale=ratio)]


@hookimpl
def tunerkit_factors(adapter: LoraAdapter | SubtractedLora) -> Factors:
    """Return ΔW as low-rank factors, for merging and conversion."""
    return adapter.factors()


@hookimpl
def tunerkit_from_factors(factors: Mapping[str, Factors]) -> tuple[LoraConfig, Mapping[str, LoraAdapter]]:
    """Build the config and the adapters from given products."""
    config = LoraConfig.of_ranks({path: product.rank for path, product in factors.items()})
    return config, {path: adapter_of(product, scale=config.scale_at(path)) for path, product in factors.items()}
