"""The hooks and the plugins that answer them: specs, discovery, validation, the registry."""

from tunerkit.hooks.calls import (
    adds_products,
    after_step,
    attached_by_plugin,
    before_step,
    budget,
    build_adapter,
    calibrate,
    changes_gradients,
    delta,
    engine,
    factors,
    finish,
    from_factors,
    has_delta,
    has_factors,
    has_shared,
    open_run,
    param_groups,
    ranks_changed,
    restore,
    shared,
    start,
    state,
    takes_factors,
    unwrapped,
    watches_steps,
    wrapped,
)
from tunerkit.hooks.gather import gather_formats, gather_knowledge, gather_shardings
from tunerkit.hooks.method_config import configure, structure
from tunerkit.hooks.registry import registry

methods = registry.methods
register = registry.register
unregister = registry.unregister
unserved = registry.unserved
