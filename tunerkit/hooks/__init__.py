"""The hooks and the plugins that answer them: specs, loading, the registry, and the calls of core."""

from tunerkit.extras import ROWS, elsewhere
from tunerkit.hooks import specs
from tunerkit.hooks.answers import (
    Caller,
    Callers,
    adds_products,
    ask,
    budget,
    callers_of,
    delta,
    factors,
    from_factors,
    has_delta,
    has_factors,
    statistics,
    structure,
    watches_steps,
)
from tunerkit.hooks.engines import Engine, Pieces, Removable, same, whole_pieces
from tunerkit.hooks.knowledge import (
    adapted,
    because_of,
    configure,
    first,
    gather_formats,
    gather_holdings,
    gather_knowledge,
    gather_restrictions,
    libraries_of,
    naming,
    ranks_changed,
    restrictions_of,
    tell,
    wrapped,
)
from tunerkit.hooks.loading import IN_PROCESS, Asking
from tunerkit.hooks.registry import registry
from tunerkit.layers import weights

implements = registry.implements
lacking = registry.lacking
method_record = registry.get
methods = registry.methods
register = registry.register
unregister = registry.unregister
unserved = registry.unserved

# Set here, since layers cannot import hooks, which import layers.
weights.plugins.holdings = gather_holdings
