"""An HTML page, read and checked: its tags are balanced, and it is self-contained."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})
LOADING = ("src", "href", "data", "action", "poster", "srcset", "xlink:href")


class Page(HTMLParser):
    """The tags of a page with their attributes, its texts, and what is wrong with it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.problems: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] or "" for tag, attrs in self.tags if tag == "section"]


def checked(text: str) -> Page:
    """Read a page that is well-formed, loads nothing and runs nothing."""
    page = Page(text)
    assert page.problems == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    loads = [(tag, key) for tag, attrs in page.tags for key in attrs if key in LOADING or key.startswith("on")]
    assert loads == []
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import|expression", style[1])
    for drawing in drawings(text):
        assert (drawing.get("role") == "img" and drawing.get("aria-label")) or drawing.get("aria-hidden") == "true"
    return page


def drawings(text: str) -> list[ElementTree.Element]:
    """The SVG elements of a page, read as XML."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def titles(text: str) -> list[str]:
    """What the parts of all drawings, and the cells of those made of tables, show when the pointer rests on them."""
    drawn = [title.text or "" for drawing in drawings(text) for title in drawing.iter("title")]
    return drawn + [attrs["title"] or "" for tag, attrs in Page(text).tags if tag == "td" and "title" in attrs]
