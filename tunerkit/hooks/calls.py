"""Call the hooks: one typed function for each hook that core calls.

All but `ranks_changed` call only the plugin that owns the method. If it does not implement the hook, they return None
or an empty value.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from tunerkit.config import AdapterConfig
from tunerkit.errors import PluginError
from tunerkit.hooks import specs
from tunerkit.hooks.registry import registry
from tunerkit.hooks.tuner_view import TunerView
from tunerkit.layers import Adapter, BaseLayer
from tunerkit.records import Delta, RankChange, State, Target


def build_adapter(method: str, target: Target, base: BaseLayer, config: AdapterConfig) -> Adapter:
    """Build one adapter with the method's plugin. Raises `PluginError` if the result is not an adapter."""
    built = registry.call(specs.tunerkit_build_adapter, method, target=target, base=base, config=config)
    if not isinstance(built, Adapter):
        raise PluginError(
            f"{registry.plugin_of(method)} built {type(built).__name__} for {target.path!r}; tunerkit_build_adapter "
            "must return a tunerkit.Adapter"
        )
    if target.module in built.modules():
        raise PluginError(
            f"{registry.plugin_of(method)} built an adapter that holds {target.path!r} as a child; forward receives "
            "the base layer as an argument, so do not store it"
        )
    return built


def start(tuner: TunerView, total_steps: int | None) -> object | None:
    """Return the method's initial training state."""
    # The spec says which methods may get None, which means that the length is unknown.
    return registry.call(specs.tunerkit_start, tuner.method, tuner=tuner, total_steps=total_steps)


def before_step(tuner: TunerView, step: int, grad_scale: Tensor | None) -> Iterable[nn.Parameter] | None:
    """Notify the method that its gradients are complete; the parameters that this step must not move."""
    return registry.call(specs.tunerkit_before_step, tuner.method, tuner=tuner, step=step, grad_scale=grad_scale)


def after_step(tuner: TunerView, step: int) -> Mapping[str, int] | None:
    """Notify the method that its weights were updated. Returns the ranks by target path if it made an allocation."""
    return registry.call(specs.tunerkit_after_step, tuner.method, tuner=tuner, step=step)


def finish(tuner: TunerView) -> Mapping[str, int] | None:
    """Let the method make its final allocation. Returns the ranks by target path if it did."""
    return registry.call(specs.tunerkit_finish, tuner.method, tuner=tuner)


def budget(tuner: TunerView, step: int | None) -> int | None:
    """Return the budget in force after ``step`` optimizer steps (None: now). None: it is the sum of the live ranks."""
    return registry.call(specs.tunerkit_budget, tuner.method, tuner=tuner, step=step)


def ranks_changed(tuner: TunerView, change: RankChange) -> None:
    """Notify every plugin of an allocation."""
    registry.call_all(specs.tunerkit_ranks_changed, tuner=tuner, change=change)


def watches_steps(method: str) -> bool:
    """Whether the method acts after a step."""
    return registry.implements(specs.tunerkit_after_step, method)


def has_delta(method: str) -> bool:
    """Whether the method can return what it adds as a dense matrix."""
    return registry.implements(specs.tunerkit_delta, method)


def delta(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Delta:
    """Return what an adapter adds to its base layer: ``weight`` (out, in) and ``bias`` (out,).

    Raises `PluginError` for a wrong type or shape; broadcasting could hide a wrong shape.
    """
    found = registry.call(specs.tunerkit_delta, method, adapter=adapter, base=base)
    plugin = registry.plugin_of(method)
    if not isinstance(found, Delta):
        raise PluginError(f"{plugin} must return a tunerkit.Delta for {path!r}, got {type(found).__name__}")
    features = (base.out_features, base.in_features)
    for what, tensor, shape in (("weight", found.weight, features), ("bias", found.bias, features[:1])):
        if tensor is not None and (got := tuple(tensor.shape)) != shape:
            raise PluginError(f"{plugin} returned a delta {what} of shape {got} for {path!r}, expected {shape}")
    return found


def state(tuner: TunerView) -> State:
    """Return what training needs to resume, in addition to the adapter's weights."""
    found = registry.call(specs.tunerkit_state, tuner.method, tuner=tuner)
    return found if found is not None else State(tensors={}, values={})


def restore(tuner: TunerView, saved: State) -> None:
    """Restore what `state` returned."""
    registry.call(specs.tunerkit_restore, tuner.method, tuner=tuner, state=saved)
