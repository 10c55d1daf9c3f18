"""Figures on pages that count something in the code are those of the code."""

import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md")]
PAGES += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")]


def mistakes() -> int:
    from plugins.cli.tests.bad_inputs import CASES

    return len(CASES)


def checks() -> int:
    from tunerkit_testing.checks.order import CHECKS

    return len(CHECKS)


# What a page says, what counts it, and what that needs.
FIGURES: dict[str, tuple[str, Callable[[], int], tuple[str, ...]]] = {
    "mistakes": (r"(?:each of|all) (\d+) mistakes", mistakes, ("tunerkit_cli", "typer")),
    "checks": (r"\bruns (\d+) checks", checks, ()),
}


def stated(pattern: str, text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(pattern, text)]


def wrong_counts(name: str, pages: Iterable[Path]) -> dict[str, list[int]]:
    pattern, count, needed = FIGURES[name]
    if absent := [each for each in needed if find_spec(each) is None]:
        pytest.skip(f"counting {name} needs {', '.join(absent)}")
    right = count()
    found = {page.relative_to(ROOT).as_posix(): stated(pattern, page.read_text("utf-8")) for page in pages}
    return {page: figures for page, figures in found.items() if set(figures) - {right}}


@pytest.mark.parametrize("name", FIGURES)
def test_a_count_on_a_page_is_that_of_the_code(name: str) -> None:
    """Law: a figure that counts something here is renewed with it."""
    assert wrong_counts(name, PAGES) == {}


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/evidence/*.md")), ids=lambda page: page.name)
def test_a_page_of_measurements_says_when_and_with_what_they_were_made(page: Path) -> None:
    """A date, and the version of tunerkit or of torch: a figure without them cannot be compared."""
    text = page.read_text("utf-8")
    assert re.search(r"\b20\d\d-\d\d-\d\d\b|\b\d{1,2} [A-Z][a-z]+ 20\d\d\b", text)
    assert re.search(r"\b(tunerkit|torch)\b[ |]+\d+\.\d+", text)
