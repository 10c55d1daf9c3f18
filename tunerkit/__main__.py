"""``python -m tunerkit``: the command, when installed scripts are not on the PATH."""

from tunerkit.cli import main

main()
