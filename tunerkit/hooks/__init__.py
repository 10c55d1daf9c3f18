"""The hooks and the plugins that answer them: specs, loading, validation, the registry."""

from tunerkit.hooks.calls import (
    adds_products,
    after_step,
    before_step,
    budget,
    build_adapter,
    calibrate,
    changes_gradients,
    configure,
    delta,
    factors,
    finish,
    from_factors,
    has_delta,
    has_factors,
    has_shared,
    param_groups,
    restore,
    shared,
    start,
    state,
    structure,
    takes_factors,
    watches_steps,
)
from tunerkit.hooks.gather import (
    attached_by_plugin,
    engine,
    gather_formats,
    gather_knowledge,
    gather_shardings,
    open_run,
    ranks_changed,
    unwrapped,
    wrapped,
)
from tunerkit.hooks.registry import registry

methods = registry.methods
register = registry.register
unregister = registry.unregister
unserved = registry.unserved
