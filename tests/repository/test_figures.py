"""Figures on pages that count something in the code are those of the code."""

import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"]
PAGES += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")]


def mistakes() -> int:
    from tests.support.bad_inputs import CASES

    return len(CASES)


def checks() -> int:
    from tunerkit_testing.checks.order import CHECKS

    return len(CHECKS)


def rows_of_faults() -> int:
    from tests.faults.table import ROWS

    return len(ROWS)


# What a page says, what counts it, and what that needs.
FIGURES: dict[str, tuple[str, Callable[[], int], tuple[str, ...]]] = {
    "mistakes": (r"(?:each of|all) (\d+) mistakes", mistakes, ("tunerkit_cli", "typer")),
    "checks": (r"\bruns (\d+) checks", checks, ()),
    "faults": (r"\bin (\d+) rows, for tunerkit and for peft", rows_of_faults, ("peft", "transformers")),
}


def stated(pattern: str, text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(pattern, text)]


def wrong_counts(name: str, pages: Iterable[Path]) -> dict[str, list[int]]:
    pattern, count, needed = FIGURES[name]
    if absent := [each for each in needed if find_spec(each) is None]:
        pytest.skip(f"counting {name} needs {', '.join(absent)}")
    right = count()
    found = {page.relative_to(ROOT).as_posix(): stated(pattern, page.read_text("utf-8")) for page in pages}
    print(f"there are {right} {name}")
    return {page: figures for page, figures in found.items() if set(figures) - {right}}


@pytest.mark.parametrize("name", FIGURES)
def test_a_count_on_a_page_is_that_of_the_code(name: str) -> None:
    """Law: a figure that counts something here is renewed with it."""
    assert wrong_counts(name, PAGES) == {}


@pytest.mark.parametrize("name", FIGURES)
def test_a_count_in_the_changelog_is_that_of_the_code(name: str) -> None:
    """What a user can do now is counted now."""
    assert wrong_counts(name, [ROOT / "CHANGELOG.md"]) == {}


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/evidence/*.md")), ids=lambda page: page.name)
def test_a_page_of_measurements_says_when_and_with_what_they_were_made(page: Path) -> None:
    """A date, and the version of tunerkit or of torch: a figure without them cannot be compared."""
    text = page.read_text("utf-8")
    assert re.search(r"\b20\d\d-\d\d-\d\d\b|\b\d{1,2} [A-Z][a-z]+ 20\d\d\b", text)
    assert re.search(r"\b(tunerkit|torch)\b[ |]+\d+\.\d+", text)


def test_a_stale_count_would_be_seen() -> None:
    """Each pattern reads its sentence."""
    assert stated(FIGURES["mistakes"][0], "the message for each of 113 mistakes.") == [113]
    assert stated(FIGURES["checks"][0], "`tunerkit check` runs 52 checks of") == [52]
    assert stated(FIGURES["faults"][0], "faults\nin 23 rows, for tunerkit and for peft.") == [23]
