"""What an engine's plugin imports beside `tunerkit.plugin`: the modules of adapters, and how to recognise a class.

An engine derives from `tunerkit.plugin.Engine`, and the hook `tunerkit_engine` returns it.
"""

from tunerkit.hooks import Removable
from tunerkit.injection import is_called, slots_in
from tunerkit.layers import is_named

__all__ = ["Removable", "is_called", "is_named", "slots_in"]
