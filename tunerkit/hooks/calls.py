"""Call the hooks: one typed function for each hook that core calls.

All but `ranks_changed` ask only the plugin that owns the method. Without an implementation they return None, or what
stands for nothing to say.
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
    """One adapter from the method's own plugin. Raises `PluginError` if it built something else."""
    built = registry.call(specs.tunerkit_build_adapter, method, target=target, base=base, config=config)
    if not isinstance(built, Adapter):
        raise PluginError(
            f"{registry.plugin_of(method)} built {type(built).__name__} for {target.path!r}; tunerkit_build_adapter "
            "must return a tunerkit.Adapter"
        )
    if target.module in built.modules():
        raise PluginError(
            f"{registry.plugin_of(method)} built an adapter that holds {target.path!r} as a child; forward is given "
            "the base layer, so do not keep it"
        )
    return built


def start(tuner: TunerView, total_steps: int | None) -> object | None:
    """The method's own training state at the start of training."""
    # Not every plugin knows that None means an unknown length: the spec says which methods see it.
    return registry.call(specs.tunerkit_start, tuner.method, tuner=tuner, total_steps=total_steps)


def before_step(tuner: TunerView, step: int, grad_scale: Tensor | None) -> Iterable[nn.Parameter] | None:
    """Tell the method that its gradients are complete and nothing is updated; the parameters that must not move."""
    return registry.call(specs.tunerkit_before_step, tuner.method, tuner=tuner, step=step, grad_scale=grad_scale)


def after_step(tuner: TunerView, step: int) -> Mapping[str, int] | None:
    """Tell the method that its weights were updated; the ranks by target path if it allocated."""
    return registry.call(specs.tunerkit_after_step, tuner.method, tuner=tuner, step=step)


def finish(tuner: TunerView) -> Mapping[str, int] | None:
    """Let the method make its final allocation; the ranks by target path if it did."""
    return registry.call(specs.tunerkit_finish, tuner.method, tuner=tuner)


def has_budget(method: str) -> bool:
    """Whether the method has a budget other than the sum of its live ranks."""
    return registry.implements(specs.tunerkit_budget, method)


def budget(tuner: TunerView, step: int | None) -> int | None:
    """The budget in force after ``step`` optimizer steps (None: now), if the method has one of its own."""
    return registry.call(specs.tunerkit_budget, tuner.method, tuner=tuner, step=step)


def ranks_changed(tuner: TunerView, change: RankChange) -> None:
    """Notify every plugin of an allocation."""
    registry.call_all(specs.tunerkit_ranks_changed, tuner=tuner, change=change)


def watches_steps(method: str) -> bool:
    """Whether the method does anything after a step."""
    return registry.implements(specs.tunerkit_after_step, method)


def has_delta(method: str) -> bool:
    """Whether the method can say what it adds as a dense matrix."""
    return registry.implements(specs.tunerkit_delta, method)


def delta(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Delta:
    """What an adapter adds to its base layer: ``weight`` (out, in), ``bias`` (out,).

    Raises `PluginError` for another type, and for shapes that broadcasting would silently turn into something else.
    """
    found = registry.call(specs.tunerkit_delta, method, adapter=adapter, base=base)
    plugin = registry.plugin_of(method)
    if not isinstance(found, Delta):
        raise PluginError(f"{plugin} must return a tunerkit.Delta for {path!r}, got {type(found).__name__}")
    features = (base.out_features, base.in_features)
    for what, tensor, shape in (("weight", found.weight, features), ("bias", found.bias, features[:1])):
        if tensor is not None and tuple(tensor.shape) != shape:
            got = tuple(tensor.shape)
            raise PluginError(f"{plugin} gave a delta {what} of shape {got} for {path!r}, expected {shape}")
    return found


def state(tuner: TunerView) -> State:
    """What training needs to resume, apart from the adapter's weights."""
    found = registry.call(specs.tunerkit_state, tuner.method, tuner=tuner)
    return found if found is not None else State(tensors={}, values={})


def restore(tuner: TunerView, saved: State) -> None:
    """Give the method back what `state` returned."""
    registry.call(specs.tunerkit_restore, tuner.method, tuner=tuner, state=saved)
