"""``python -m tunerkit_cli``: the command, when installed scripts are not on the PATH."""

from tunerkit_cli import main

main()
