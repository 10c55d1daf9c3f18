"""Rows in a JSON-lines file: one for each run, appended as soon as the run is finished."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """All complete rows; a truncated last line is ignored."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def read_all(folder: Path) -> dict[str, list[Row]]:
    """The rows of every file in a folder, by file name without its suffix."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.jsonl"))}


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append a row after the last complete one, and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, sort_keys=True, allow_nan=False) + "\n"
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
