"""Importing this loads tunerkit and all installed plugins, so that a server of processes forks with them."""

from contextlib import suppress

import tunerkit
from tunerkit import plugin
from tunerkit.errors import VerbError

# Names are imported when they are first asked for.
for _module in (tunerkit, plugin):
    for _name in dir(_module):
        with suppress(VerbError):  # its distribution is not installed
            getattr(_module, _name)
tunerkit.methods()
