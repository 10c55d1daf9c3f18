"""Reports in a real browser: nothing on its console, no sideways scrolling, and both colour schemes."""

from pathlib import Path
from typing import Any

import pytest

from plugins.cli.tests import run_records
from tests.support import browser
from tunerkit_cli.report.html import compare, render

LONG = "averylongnamewithoutanyblank" * 8


def hostile() -> dict[str, Any]:
    """A record whose every name is long and unbreakable, and tries to be markup."""
    record = run_records.classifier(layers=3)
    name = f"<script>alert(1)</script>{LONG}"
    renamed = {path: f"{name}.{path}" for path in record["ranks"]}
    for key in ("ranks", "caps", "sizes", "spectrum"):
        record[key] = {renamed[path]: value for path, value in record[key].items()}
    record |= {
        "task": name,
        "method": name,
        "labels": [name, f"{name}2"],
        "model": {"name": name},
        "data": {"train": name},
    }
    record["metrics"] = {name: 0.5, **record["metrics"]}
    record["baseline"] = {"what": name, "metrics": {name: 0.25}}
    record["samples"] = [{"prompt": name, "before": name, "after": name}]
    record["config"] = {name: {name: name}}
    record["recipe"]["out"] = name
    return record


PAGES = {
    "a language model": lambda: render(run_records.language_model()),
    "224 targets": lambda: render(run_records.large()),
    "long names": lambda: render(hostile()),
    "a comparison": lambda: compare(
        {LONG: run_records.classifier(), "b": run_records.classifier(seed=3), "c": run_records.regression()}
    ),
}


def fits(found: browser.Measured) -> bool:
    """The console is empty, and at both widths nothing sticks out, is clipped or has run."""
    assert found.console == []
    assert set(found.layouts) == {1280, 390}
    for width, layout in found.layouts.items():
        assert layout["inner"] == width
        assert layout["over"] == []
        assert layout["clipped"] == []
        assert layout["scroll"] <= width
        assert layout["scripts"] == 1  # the one that measures
    return True


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_its_window_and_leaves_the_console_empty(page: str, tmp_path: Path) -> None:
    """Wide tables and heatmaps scroll in boxes of their own, and long names are broken or cut."""
    assert fits(browser.measured(PAGES[page](), tmp_path))


@pytest.mark.parametrize("scheme", [browser.LIGHT, browser.DARK])
def test_a_page_follows_the_preferred_colour_scheme(scheme: int, tmp_path: Path) -> None:
    """Dark text on a light page, and the other way round."""
    found = browser.measured(render(run_records.classifier()), tmp_path, scheme=scheme)
    assert fits(found)
    page, text = (brightness(found.layouts[1280][part]) for part in ("background", "text"))
    assert (page > 200 > 60 > text) if scheme == browser.LIGHT else (page < 60 < 200 < text)


def test_what_sticks_out_and_what_is_blocked_would_be_seen(tmp_path: Path) -> None:
    """The measurements above can fail: a wide box, a script and an image are all noticed."""
    planted = '<div style="width: 700px">wide</div><img src="x.png"><script>alert(1)</script></main>'
    page = render(run_records.minimal()).replace("</main>", planted)
    found = browser.measured(page, tmp_path, widths=[390])
    assert found.layouts[390]["scroll"] > 390
    assert len(found.layouts[390]["over"]) == 1
    assert found.layouts[390]["scripts"] == 2
    assert len(found.console) == 2


def brightness(colour: str) -> float:
    """The mean of red, green and blue in ``rgb(…)``."""
    parts = [int(part) for part in colour.strip("rgb()").split(",")]
    return sum(parts) / len(parts)
