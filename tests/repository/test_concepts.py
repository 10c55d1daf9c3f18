"""The concept pages name functions that exist, and put equations beside functions that name them too."""

import re
from importlib import import_module
from pathlib import Path

import pytest

CONCEPTS = sorted((Path(__file__).parents[2] / "docs/concepts").glob("*.md"))
NAME = re.compile(r"`(tunerkit(?:_\w+)?(?:\.\w+){2,})`")
ROW = re.compile(r"^\| \((\d+)\)(?: to \((\d+)\))? \|.*$", re.MULTILINE)
# These state their equations by the words "Eq. 2" and so on, or in the docstring of their module.
EQUATIONS = next(page for page in CONCEPTS if page.stem == "lora-and-adalora")


def found(name: str) -> object:
    """What a dotted name stands for; AttributeError or ImportError if there is nothing."""
    parts = name.split(".")
    thing: object = pytest.importorskip(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        thing = getattr(thing, part, None) or import_module(".".join(parts[:number]))
    return thing


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: str(page.stem))
def test_the_names_in_the_concept_pages_exist(page: Path) -> None:
    """Every dotted name of our packages in a concept page can be imported."""
    for name in NAME.findall(page.read_text(encoding="utf-8")):
        assert found(name) is not None


def test_equations_stand_beside_the_functions_that_name_them() -> None:
    """Each numbered row's functions, or the modules that they are in, say the same number in their docstrings."""
    pytest.importorskip("tunerkit_adalora")
    rows = list(ROW.finditer(EQUATIONS.read_text(encoding="utf-8")))
    assert [row[1] for row in rows] == ["2", "4", "6", "8", "9", "10", "11", "14"]
    for row in rows:
        for name in NAME.findall(row[0]):
            module = import_module(name.rpartition(".")[0] if "Schedule" not in name else name.rsplit(".", 2)[0])
            said = f"{found(name).__doc__} {module.__doc__}"
            assert re.search(rf"Eq\. (?:\d+, |\d+-)*{row[1]}\b", said), (row[0], said)
