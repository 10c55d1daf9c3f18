"""Break the source on purpose, once for each row of the fault suite, and see whether the row notices.

Run it in the repository: ``python scripts/mutations.py [row]...``. Each break is made in a temporary copy of the tree.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]
COPIED = ("tunerkit", "tests", "plugins", "scripts", "docs", "pyproject.toml")


@attrs.frozen
class Mutation:
    """One break: in ``file``, ``old`` becomes ``new``, and the row must have failures then."""

    row: str
    file: str
    old: str
    new: str


MUTATIONS: tuple[Mutation, ...] = ()


def apply(mutation: Mutation, root: Path) -> None:
    """Make the break in a copy of the tree. The old text must stand there once, or the break is out of date."""
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times, not once")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def is_caught(mutation: Mutation) -> tuple[bool, str]:
    """Whether the row has failures with the break, and the first of them."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(source, root / name)
        apply(mutation, root)
        return _run(mutation.row, root)


def _run(row: str, root: Path) -> tuple[bool, str]:
    paths = [str(root), *(str(plugin) for plugin in sorted(root.glob("plugins/*")))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.faults", "--subject", "tunerkit", "--row", row]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    # Without a line the row itself did not run: that is no proof that it notices anything.
    return done.returncode == 1 and bool(lines), lines[0] if lines else done.stderr.strip()[-300:]


def main(rows: Sequence[str]) -> int:
    """Try the breaks, print a table, and say by the exit code whether one was not caught."""
    missed = 0
    print("| row | break | caught | the first failure |\n|---|---|---|---|")
    for mutation in MUTATIONS:
        if rows and mutation.row not in rows:
            continue
        caught, line = is_caught(mutation)
        missed += not caught
        print(f"| {mutation.row} | `{mutation.file}` | {'yes' if caught else 'NO'} | {line[:150]} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
