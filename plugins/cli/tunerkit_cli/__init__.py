"""The command ``tunerkit``; installed with the extra ``[cli]`` of tunerkit."""

import sys


def main() -> None:
    """Run the command. If a package is missing, print one line that names the extra to install."""
    try:
        from tunerkit_cli.app import run  # everything that needs the extra is imported below this line
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("tunerkit"):
            raise
        from tunerkit.extras import install

        print(f"tunerkit: the command needs {missing.name}: {install('cli')}", file=sys.stderr)
        sys.exit(2)
    run()
