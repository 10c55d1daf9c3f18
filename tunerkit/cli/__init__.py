"""The command ``tunerkit``, behind the extra ``[cli]``."""

import sys


def main() -> None:
    """Run the command, or say in one line which extra is missing."""
    try:
        from tunerkit.cli.app import run  # what the extra brings is imported from here on
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("tunerkit"):
            raise
        print(f'tunerkit: the command needs {missing.name}: pip install "tunerkit[cli]"', file=sys.stderr)
        sys.exit(2)
    run()
