"""Importing this loads tunerkit and all installed plugins, so that a server of processes forks with them."""

import tunerkit

# Its names are imported when they are first asked for.
for _name in vars(tunerkit)["__all__"]:
    getattr(tunerkit, _name)
tunerkit.methods()
