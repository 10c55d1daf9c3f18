"""Importing this loads tunerkit and all installed plugins, so that a server of processes forks with them."""

import tunerkit
from tunerkit import plugin

# Names are imported when they are first asked for.
for _module in (tunerkit, plugin):
    for _name in dir(_module):
        getattr(_module, _name)
tunerkit.methods()
