"""What mkdocs calls while it builds the site: generated parts of pages, tables that fit, and the order of results."""

import re
from collections.abc import Mapping
from typing import Any, Final

from scripts.docs.reference import FRAGMENTS
from scripts.docs.tables import LabelledCells
from scripts.release.building import address

_LITERAL: Final = re.compile(r"::</p>(?=\s*<div)")
_PLACE: Final = re.compile(r"^<!-- generated: (?P<name>[a-z ]+) -->$", re.MULTILINE)
# What someone who searches wants first, by folder: pages that begin something come before records of measurements.
_BOOSTS: Final[Mapping[str, float]] = {"start": 4, "how-to": 3, "concepts": 2, "evidence": 0.5}


def on_config(config: Any) -> Any:
    """Add the extension of our own to Markdown's, and the link to the repository, once it has an address."""
    config["markdown_extensions"].append(LabelledCells())
    config["extra"]["social"] = repository_links(address())
    return config


def repository_links(repository: str) -> list[dict[str, str]]:
    """Return the footer's links. With mkdocs's ``repo_url``, the theme would ask the host for the number of stars."""
    return [{"icon": "fontawesome/brands/git-alt", "link": repository, "name": "Repository"}] if repository else []


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put generated text in the places that name it. An unknown name ends the build with a KeyError."""
    boost = _BOOSTS.get(page.file.src_uri.partition("/")[0], 1)
    page.meta.setdefault("search", {"boost": boost})
    return _PLACE.sub(lambda found: FRAGMENTS[found["name"]](), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """End a sentence before code with one colon: docstrings have two, as reStructuredText wants them."""
    return _LITERAL.sub(":</p>", html)
