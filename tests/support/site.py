"""The documentation site: built once for all tests, read as headings and rows of tables, and served to a browser."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import attrs
import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's folder. Of several workers, the first one builds it, strictly."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", f"{folder}.part"]
            environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
            Path(f"{folder}.part").rename(folder)
    return folder


@attrs.frozen
class Heading:
    """A heading: its anchor and its text."""

    anchor: str
    text: str


class Read(HTMLParser):
    """What a page of the site says: its headings, all anchors, the rows of its tables, and its whole text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.headings: list[Heading] = []
        self.anchors: set[str] = set()
        self.rows: list[list[str]] = []
        self.items: list[str] = []
        self.links: list[str] = []
        self._anchor = ""
        self._texts: dict[str, list[str]] = {}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.anchors.add(values["id"] or "")
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")
        if tag in HEADINGS:
            self._anchor = values.get("id") or ""
        if tag == "tr":
            self.rows.append([])
        if tag in (*HEADINGS, "td", "li"):
            self._texts[tag] = []

    def handle_endtag(self, tag: str) -> None:
        text = " ".join("".join(self._texts.pop(tag, [])).split())
        if tag in HEADINGS:
            self.headings.append(Heading(self._anchor, text.removesuffix("¶").strip()))
        elif tag == "td":
            self.rows[-1].append(text)
        elif tag == "li":
            self.items.append(text)

    def handle_data(self, data: str) -> None:
        for texts in self._texts.values():
            texts.append(data)


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine alone, and return its address."""
    handler = functools.partial(_Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
