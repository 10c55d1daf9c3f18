"""The built site in headless Chromium: everything fits, nothing comes from elsewhere, and search finds the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("material", reason="the site is built with mkdocs-material, which is not installed")
pytest.importorskip("mkdocstrings", reason="the API is read by mkdocstrings, which is not installed")
pytest.importorskip("tunerkit_adalora", reason="the site describes all plugins, which are not installed")
pytest.importorskip("playwright", reason="the browser is driven by playwright, which is not installed")

from playwright.sync_api import Page, sync_playwright

from tests.support.browser import chromium
from tests.support.site import built, served

WIDTHS = (1280, 390)
# Tables and code that are wider than the text's column or than what they show of themselves. A cell that is wider than
# its column counts too. What is folded or behind a tab is shown for it.
_TOO_WIDE = """() => {
  document.querySelectorAll("details").forEach((e) => (e.open = true));
  document.querySelectorAll(".tabbed-block").forEach((e) => (e.style.display = "block"));
  const column = document.querySelector("article").getBoundingClientRect();
  const style = getComputedStyle(document.querySelector("article"));
  const right = column.right - parseFloat(style.paddingRight);
  const over = (e) => Math.max(e.getBoundingClientRect().right - right, e.scrollWidth - e.clientWidth);
  const boxes = [...document.querySelectorAll("article table, article pre, article pre > code")];
  const cells = [...document.querySelectorAll("article td, article th")];
  const shown = [...boxes, ...cells].filter((e) => e.getClientRects().length && over(e) > 1);
  return {
    count: boxes.filter((e) => e.tagName !== "CODE").length,
    over: shown.map((e) => `${e.tagName} by ${Math.round(over(e))}: ${e.textContent.trim().slice(0, 40)}`),
    page: document.documentElement.scrollWidth - innerWidth,
  };
}"""
# What someone types, and the page that they want.
WANTED = {
    "install": "start/install.html",
    "tutorial": "start/tutorial.html",
    "API": "reference/api.html",
    "faq": "start/faq.html",
    "dora": "concepts/features.html",
    "generate": "start/tutorial.html",
    "multiple gpus": "how-to/multiple-gpus.html",
    "moe": "start/faq.html",
    "merge": "how-to/serving.html",
    "resume": "how-to/training.html",
    "wandb": "how-to/logging.html",
    "tensorboard": "how-to/logging.html",
    "streaming": "how-to/recipes.html",
    "sweep": "how-to/sweep.html",
    "out of memory": "how-to/memory.html",
    "OOM": "how-to/memory.html",
    "reward model": "how-to/preference-training.html",
    "timm": "how-to/images.html",
    "diffusers": "how-to/diffusion.html",
    "packing": "how-to/packing.html",
    "sentence-transformers": "how-to/embedding.html",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with served(site) as found:
        yield found


@pytest.fixture(scope="module")
def pages() -> Iterator[dict[int, Page]]:
    """A page of each width. To resize one is to wait without a limit, and Chromium has been seen not to answer."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        yield {width: browser.new_page(viewport={"width": width, "height": 900}) for width in WIDTHS}
        browser.close()


@pytest.fixture
def page(pages: dict[int, Page]) -> Page:
    return pages[WIDTHS[0]]


def too_wide(page: Page) -> dict[str, Any]:
    found = page.evaluate(_TOO_WIDE)
    assert isinstance(found, dict)
    return found


def test_everything_fits_and_nothing_comes_from_another_host(site: Path, address: str, pages: dict[int, Page]) -> None:
    """On every page, at two widths: no table and no code is wider than its box, and the console is silent."""
    elsewhere: list[str] = []
    said: list[str] = []
    for page in pages.values():
        page.on("request", lambda asked: elsewhere.append(asked.url))
        page.on("console", lambda line: said.append(f"{line.type}: {line.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
    problems: list[str] = []
    boxes = 0
    for path in sorted(site.rglob("*.html")):
        for width, page in pages.items():
            page.goto(address + path.relative_to(site).as_posix())
            found = too_wide(page)
            boxes += found["count"]
            problems += [f"{path.stem} at {width}: {each}" for each in found["over"]]
            problems += [f"{path.stem} at {width}: the page itself"] if found["page"] > 0 else []
    assert boxes > 2 * 300
    assert problems == []
    assert [each for each in elsewhere if not each.startswith((address, "data:"))] == []
    assert [each for each in said if each.startswith(("error", "warning", "Error"))] == []


@pytest.mark.parametrize("asked", WANTED)
def test_search_finds_the_page_that_one_wants(address: str, page: Page, asked: str) -> None:
    """It leads to that page among the first three results."""
    page.goto(f"{address}index.html?{urlencode({'q': asked})}")  # typed, each letter would show other results
    page.locator(".md-search-result__meta", has_text="matching").wait_for()
    # A result is a page, with the sections of it that match below it. They are shown as one scrolls to them.
    results = page.locator(".md-search-result__item")
    results.first.wait_for()
    first = [result.locator("a.md-search-result__link").first for result in results.all()[:3]]
    found = [str(link.get_attribute("href")).removeprefix(address).partition("?")[0] for link in first]
    assert WANTED[asked] in [each.partition("#")[0] for each in found]
