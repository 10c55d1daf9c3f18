"""``python -m tunerkit.cli``, for where scripts are not on the path."""

from tunerkit.cli import main

main()
