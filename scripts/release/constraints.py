"""Writes constraints.txt: the exact versions in the environments given, as an index has them.

    python -m scripts.release.constraints .venv .venv-quantisers

Our own distributions are left out: they come from the tree.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Final

from scripts.release.building import ROOT

FILE: Final = ROOT / "constraints.txt"
HEAD: Final = """\
# The exact versions that CI and the Makefile install. `make constraints` writes this file.
# The pyproject.toml files ask for ranges; the tests ran with these versions.
"""
# What `python -m venv` brings differs with Python; ours are not on an index.
_LEFT_OUT: Final = re.compile(r"pip|setuptools|tunerkit(-.*)?")


def lines_of(environments: dict[str, dict[str, str]]) -> list[str]:
    """The lines of the file, one for each library.

    Args:
        environments: The name of each environment -> library -> version. Local versions, such as that of a torch
            without CUDA, are on no index: only the release before the "+" is written.

    Raises:
        SystemExit: Two environments have different versions of a library.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for environment, versions in environments.items():
        for name, version in versions.items():
            found[re.sub(r"[-_.]+", "-", name).lower()][environment] = version.partition("+")[0]
    kept = {name: had for name, had in sorted(found.items()) if not _LEFT_OUT.fullmatch(name)}
    if differing := [f"{name}: {had}" for name, had in kept.items() if len(set(had.values())) > 1]:
        raise SystemExit("\n".join(differing))
    return [f"{name}=={next(iter(had.values()))}" for name, had in kept.items()]


def versions_in(environment: Path) -> dict[str, str]:
    """What is installed in an environment."""
    command = [str(environment / "bin/python"), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {each["name"]: each["version"] for each in listed}


if __name__ == "__main__":
    lines = lines_of({name: versions_in(Path(name)) for name in sys.argv[1:]})
    FILE.write_text(HEAD + "\n".join(lines) + "\n", "utf-8")
    print(f"{FILE.name}: {len(lines)} libraries")
