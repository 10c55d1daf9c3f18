"""The tables in docs that people write match the code. What is generated has its tests in test_site.py."""

import re
from pathlib import Path

import attrs

from tunerkit.serialization.header import Header

DOCS = Path(__file__).parents[2] / "docs"


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading: the first cell's name -> the other cells, backticks and blanks taken off."""
    match = re.search(rf"^#+ .*`{heading}`.*?$(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert match is not None, f"there is no heading with `{heading}`"
    cells = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in match[1].splitlines()
        if line.startswith("| `")
    ]
    return {name: rest for name, *rest in cells}


def test_the_header_of_a_file_is_documented() -> None:
    """Every field of a file's header, and no other, stands in its table."""
    page = (DOCS / "concepts" / "files.md").read_text(encoding="utf-8")
    assert set(rows(page, "tunerkit")) == {field.name for field in attrs.fields(Header)}


def test_a_wrong_table_would_be_seen() -> None:
    """The tables are read cell by cell, up to the next heading."""
    page = "## A (`One`)\n\n| name | default | what |\n|---|---|---|\n| `rank` | `8` | words |\n\n"
    page += "## `Two`\n| `alpha` | `None` | |\n"
    assert rows(page, "One") == {"rank": ["8", "words"]}
    assert rows(page, "Two") == {"alpha": ["None", ""]}
