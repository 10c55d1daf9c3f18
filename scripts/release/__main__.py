"""Build all distributions, and try what was built where nothing of the clone can be seen.

    python -m scripts.release build dist
    python -m scripts.release check dist                  # a clean venv: everything else comes from the index
    python -m scripts.release check dist --borrow .venv   # the same in seconds: what is not ours comes from that venv
"""

import argparse
from pathlib import Path

from scripts.release.building import build
from scripts.release.checking import check


def main() -> None:
    """Run the step that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m scripts.release", description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    building = steps.add_parser("build", help="build wheels and sdists")
    building.add_argument("folder", type=Path)
    checking = steps.add_parser("check", help="install from the folder into a clean venv, and run the first steps there")
    checking.add_argument("folder", type=Path)
    checking.add_argument("--borrow", type=Path, metavar="VENV", help="take what is not ours from this venv")
    given = parser.parse_args()
    if given.step == "build":
        build(given.folder.resolve())
    else:
        check(given.folder.resolve(), given.borrow and given.borrow.resolve())


if __name__ == "__main__":
    main()
