"""``python -m tunerkit``: the command, where installed scripts are not on the PATH."""

import sys
from importlib.metadata import entry_points
from typing import Final

from tunerkit.extras import install

SCRIPTS: Final = [
    each
    for each in entry_points(group="console_scripts", name="tunerkit")
    if each.dist is not None and each.dist.name == "tunerkit-cli"
]
if not SCRIPTS:
    print(f"tunerkit: the command is in a distribution of its own: {install('cli')}", file=sys.stderr)
    sys.exit(2)
SCRIPTS[0].load()()
