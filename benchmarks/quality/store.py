"""Rows in a file of JSON lines: one for each run, added as soon as it is made."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """All whole rows; a last line that was cut off in writing is none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def read_all(folder: Path) -> dict[str, list[Row]]:
    """The rows of every file in a folder, by its name without the ending."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.jsonl"))}


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a row, after the last whole one, and see it onto the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, sort_keys=True, allow_nan=False) + "\n"
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
