"""Build all distributions, and try what was built where nothing of the clone can be seen.

    python -m scripts.release build dist
    python -m scripts.release check dist                  # a clean venv: everything else comes from the index
    python -m scripts.release check dist --borrow .venv   # the same in seconds: what is not ours comes from that venv
    python -m scripts.release tag v0.1.0                  # before publishing: is it the version?

The check needs a Python with which torch can be installed; everything it writes lies in a temporary folder.
"""

import argparse
from pathlib import Path

from scripts.release.building import build, refuse_tag
from scripts.release.checking import check


def main() -> None:
    """Run the step that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m scripts.release", description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    building = steps.add_parser("build", help="build wheels and sdists")
    building.add_argument("folder", type=Path)
    checking = steps.add_parser("check", help="install from the folder into a clean venv, and run it")
    checking.add_argument("folder", type=Path)
    checking.add_argument("--borrow", type=Path, metavar="VENV", help="take what is not ours from this venv")
    tagging = steps.add_parser("tag", help="refuse a tag that is not the version, and a release that messages deny")
    tagging.add_argument("tag")
    given = parser.parse_args()
    if given.step == "tag":
        refuse_tag(given.tag)
    elif given.step == "build":
        build(given.folder.resolve())
    else:
        check(given.folder.resolve(), given.borrow and given.borrow.resolve())


if __name__ == "__main__":
    main()
