"""A page in headless Chromium: what its console says, and how it is laid out."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
DARK, LIGHT = 0, 1  # Blink's numbers for the preferred colour scheme
# It runs in the page, allowed by a nonce of its own, and sends what it measured to the frame around the page.
_MEASURE = """
<script nonce="measure">
addEventListener("load", () => {
  const hidden = (e) => e.parentElement.closest(".scroll, details:not([open]), svg");
  const sticksOut = (box) => box.right > innerWidth + 0.5 || box.left < 0;
  const shown = [...document.querySelectorAll("main *")].filter((e) => !hidden(e));
  const over = shown.filter((e) => sticksOut(e.getBoundingClientRect()));
  const clipped = [...document.querySelectorAll(".grid th, .grid td")].filter((e) =>
    e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1
  );
  const style = getComputedStyle(document.body);
  parent.postMessage({
    name: name,
    inner: innerWidth,
    scroll: document.documentElement.scrollWidth,
    over: over.map((e) => `${e.tagName}.${e.getAttribute("class")}: ${e.textContent.slice(0, 40)}`),
    clipped: clipped.map((e) => e.textContent),
    background: style.backgroundColor,
    text: style.color,
    scripts: document.scripts.length,
  }, "*");
});
</script>
"""
# A frame can be narrower than the 500 pixels that a window has at least, and there may be several.
_FRAME = """<!DOCTYPE html>
<html><head><meta name="color-scheme" content="light dark"><style>body { margin: 0 }</style></head><body>
<script>
const found = {};
addEventListener("message", (event) => {
  found[event.data.name] = event.data;
  document.body.dataset.measured = JSON.stringify(found);
});
</script>
FRAMES
</body></html>
"""


@attrs.frozen
class Measured:
    """What was found out about a page: its layout by the width of its frame, and the lines of the console."""

    layouts: dict[int, dict[str, Any]]
    console: list[str]


def chromium() -> str:
    """The path of the browser; without one, the test is skipped."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)")


def measured(page: str, folder: Path, *, widths: Sequence[int] = (1280, 390), scheme: int = LIGHT) -> Measured:
    """Open a page in a fresh browser that prefers a colour scheme, once in a frame of each width in pixels."""
    browser = chromium()
    policy = "default-src 'none'"
    assert policy in page
    with_nonce = page.replace(policy, f"{policy}; script-src 'nonce-measure'").replace("</body>", f"{_MEASURE}</body>")
    (folder / "page.html").write_text(with_nonce, encoding="utf-8")
    frame = folder / "frame.html"
    frames = (
        f'<iframe name="{width}" src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>'
        for width in widths
    )
    frame.write_text(_FRAME.replace("FRAMES", "".join(frames)), encoding="utf-8")
    command = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *("--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}"),
        *("--window-size=1280,900", f"--blink-settings=preferredColorScheme={scheme}"),
        *("--virtual-time-budget=5000", "--dump-dom", frame.as_uri()),
    ]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    found = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert found is not None, f"the page was not measured: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    layouts = json.loads(html.unescape(found[1]))
    return Measured({int(name): layout for name, layout in layouts.items()}, console)
