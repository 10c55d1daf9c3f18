"""The tables in docs that people write match the code. What is generated has its tests in test_site.py."""

import re
import tomllib
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


def cells_of(heading: str) -> list[str]:
    """The first cells of the table under a heading of the install page."""
    page = (DOCS / "start/install.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [line.split("|")[1].strip() for line in lines[1:]]


def test_every_extra_is_on_the_install_page() -> None:
    """The table of extras names each extra of pyproject.toml once, and no other."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [name for cell in cells_of("Extras") for name in re.findall(r"`([^`]+)`", cell)]
    assert sorted(named) == sorted(project["optional-dependencies"])


def test_every_plugin_is_on_the_install_page() -> None:
    """The table of plugins names each distribution of the folder plugins once, and no other."""
    files = DOCS.parent.glob("plugins/*/pyproject.toml")
    names = [tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"] for file in files]
    assert sorted(cells_of("What each plugin brings")) == sorted(names)
