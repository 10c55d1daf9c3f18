"""The hooks and the plugins that answer them: specs, loading, validation, the registry."""

from tunerkit.hooks.calls import (
    Caller,
    Callers,
    adds_products,
    budget,
    build_adapter,
    calibrate,
    callers_of,
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
from tunerkit.hooks.engines import Engine, Pieces, Removable, is_grouped, same, whole_pieces
from tunerkit.hooks.gather import (
    adapted,
    attached_by_plugin,
    engine,
    gather_formats,
    gather_holdings,
    gather_knowledge,
    gather_libraries,
    gather_restrictions,
    open_run,
    ranks_changed,
    reference,
    unwrapped,
    wrapped,
)
from tunerkit.hooks.registry import registry
from tunerkit.layers import weights

methods = registry.methods
register = registry.register
unregister = registry.unregister
unserved = registry.unserved

# Layers ask how their weights are held, and cannot know the registry, which knows layers.
weights.plugins.holdings = gather_holdings
