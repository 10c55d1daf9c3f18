"""``python -m tunerkit``: the command, where installed scripts are not on the PATH."""

import sys
from importlib.metadata import entry_points

_scripts = entry_points(group="console_scripts", name="tunerkit")
if not _scripts:
    sys.exit('tunerkit: the command is a distribution of its own: pip install "tunerkit[cli]"')
next(iter(_scripts)).load()()
