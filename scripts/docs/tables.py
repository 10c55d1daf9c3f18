"""Tables that fit a telephone: each cell carries the name of its column, which the style sheet shows there."""

from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

# Columns.
_STACKED_FROM = 3  # two are narrow enough for a telephone
_NARROW_TO = 3
_DENSE_FROM = 6


class _Labels(Treeprocessor):
    def run(self, root: Element) -> None:
        for table in root.iter("table"):
            heads = [_text(cell) for cell in table.iter("th")]
            if len(heads) <= _NARROW_TO:
                table.set("data-narrow", "")
            if len(heads) >= _DENSE_FROM:
                table.set("data-dense", "")
            if len(heads) < _STACKED_FROM:
                continue
            table.set("data-stacked", "")
            for row in table.iter("tr"):
                for head, cell in zip(heads, row.iter("td"), strict=False):
                    cell.set("data-label", head)


def _text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


class LabelledCells(Extension):
    """Adds ``data-label`` to the cells of tables with three columns or more, and says how wide a table is."""

    def extendMarkdown(self, md: Markdown) -> None:
        # After the inline patterns, so that a head's code and links are its text.
        md.treeprocessors.register(_Labels(md), "labelled_cells", 5)
