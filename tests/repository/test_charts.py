"""The charts show the figures of the tables that they are drawn from."""

from pathlib import Path

import pytest

from scripts.docs.charts import ADALORA, CHARTS, Mark, mark, table


@pytest.mark.parametrize("path", CHARTS, ids=lambda path: str(path.stem))
def test_a_chart_is_drawn_from_the_page_as_it_is(path: Path) -> None:
    """A figure in a table cannot change alone: ``python -m scripts.docs.charts`` draws the charts again."""
    assert path.read_text(encoding="utf-8") == CHARTS[path](), "run python -m scripts.docs.charts"


def test_a_cell_is_read_with_its_interval() -> None:
    """A value, in bold or not, with an interval or without; a word is no number."""
    assert mark("**+0.16 [-0.19, +0.53]**", ADALORA) == Mark(0.16, (-0.19, 0.53), ADALORA)
    assert mark("0.911", ADALORA, filled=False) == Mark(0.911, None, ADALORA, filled=False)
    with pytest.raises(ValueError, match="'none' is no number"):
        mark("none", ADALORA)


def test_a_table_is_found_under_its_heading(tmp_path: Path) -> None:
    """The first one below it, without the row of dashes."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n| x |\n|---|\n| 0 |\n\n## B\n\ntext\n\n| y | z |\n|---|---:|\n| 1 | 2 |\n", encoding="utf-8"
    )
    assert table(page, "B") == [["y", "z"], ["1", "2"]]
    with pytest.raises(ValueError, match="no table under 'C'"):
        table(page, "C")
