"""More names for a plugin with an engine, beside `tunerkit.plugin`: the modules of adapters, and checks of modules.

An engine derives from `tunerkit.plugin.Engine`, and the hook `tunerkit_engine` returns it.
"""

from tunerkit.hooks import Removable
from tunerkit.injection import is_called, slots_in
from tunerkit.layers import is_named

__all__ = ["Removable", "is_called", "is_named", "slots_in"]
