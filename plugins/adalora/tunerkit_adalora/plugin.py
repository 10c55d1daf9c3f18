"""AdaLoRA's hook implementations."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit.plugin import (
    BaseLayer,
    Delta,
    Factors,
    Method,
    State,
    Statistics,
    Target,
    Tuner,
    hookimpl,
    low_rank_delta,
)
from tunerkit_adalora import fitting, state as saved_state, step as steps, training
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.conversion import from_products
from tunerkit_adalora.followers import refuse_split
from tunerkit_adalora.preconditions import refuse_for_stack
from tunerkit_adalora.svd_layer import SvdLayer


@hookimpl
def tunerkit_methods() -> Iterable[Method]:
    """Yield the method. It needs steps, since without allocations it would be LoRA with more parameters."""
    return [
        Method(
            name="adalora",
            config=AdaLoraConfig,
            needs_steps=True,
            stacks=True,
            pieces=True,
            statistics=AdaLoraConfig.request,
        ),
    ]


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: AdaLoraConfig) -> SvdLayer:
    """Build the SVD layer at one target."""
    if base.stack:
        refuse_for_stack(config)
    settings = config.resolved()
    return SvdLayer(
        in_features=base.in_features,
        out_features=base.out_features,
        rank=settings.init_rank,
        scale=settings.scale,
        dropout=config.dropout,
        start=config.start,
        train_lambda=settings.train_lambda,
        stack=base.stack,
    )


@hookimpl
def tunerkit_calibrate(tuner: Tuner, statistics: Mapping[str, Statistics]) -> None:
    """Initialize Q of each layer from statistics of the data."""
    fitting.fit_(tuner, statistics)


@hookimpl
def tunerkit_start(tuner: Tuner, total_steps: int, optimizer: Optimizer | None) -> training.Training:
    """Check the calibration, the optimizer and the schedule; return the training state."""
    if training.config_of(tuner).request() is not None:
        fitting.refuse_unfitted(tuner)
    if not tuner.engine.is_shared:
        refuse_split(tuner, optimizer)
    return training.start(tuner, total_steps)


@hookimpl
def tunerkit_before_step(tuner: Tuner, grad_scale: Tensor | None) -> Iterable[nn.Parameter] | None:
    """Add the regularizer's gradient; return all λ if the optimizer must not update them, else None."""
    return steps.before_step(tuner, grad_scale)


@hookimpl
def tunerkit_after_step(tuner: Tuner, step: int) -> Mapping[str, int] | None:
    """Update the importance averages; if an allocation is due, make it and return the new ranks by target path."""
    return steps.after_step(tuner, step)


@hookimpl
def tunerkit_finish(tuner: Tuner) -> Mapping[str, int] | None:
    """Make the final allocation now, and return the ranks by target path; None if it was made already."""
    return steps.finish(tuner)


@hookimpl
def tunerkit_budget(tuner: Tuner, step: int | None) -> int:
    """Return the schedule's budget after ``step``; if ``step`` is None, the current budget."""
    return training.budget(tuner, step)


@hookimpl
def tunerkit_delta(adapter: SvdLayer, base: BaseLayer) -> Delta:
    """Return ΔW for merging, with the current λ."""
    return Delta(weight=low_rank_delta(base, q=adapter.q, p=adapter.p, lam=adapter.lam, scale=adapter.scale))


@hookimpl
def tunerkit_factors(adapter: SvdLayer) -> Factors:
    """Return ΔW as low-rank factors, to convert it. Merging uses `tunerkit_delta`, which need not wait for a device."""
    return adapter.factors()


@hookimpl
def tunerkit_from_factors(factors: Mapping[str, Factors]) -> tuple[AdaLoraConfig, Mapping[str, SvdLayer]]:
    """Build the config and the layers from given products."""
    return from_products(factors)


@hookimpl
def tunerkit_state(tuner: Tuner) -> State:
    """Return the importance averages, the masks, and the position in the schedule."""
    return saved_state.state(tuner)


@hookimpl
def tunerkit_restore(tuner: Tuner, state: State) -> None:
    """Restore the training state from a file."""
    saved_state.restore(tuner, state)
