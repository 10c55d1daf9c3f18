"""What mkdocs calls while it builds the site: generated parts of pages, tables that fit, and the order of results."""

import re
from collections.abc import Mapping
from typing import Any, Final

from scripts.docs.reference import FRAGMENTS
from scripts.docs.tables import LabelledCells

_PLACE: Final = re.compile(r"^<!-- generated: (?P<name>[a-z ]+) -->$", re.MULTILINE)
# What someone who searches wants first, by folder: pages that begin something come before records of measurements.
_BOOSTS: Final[Mapping[str, float]] = {"start": 4, "how-to": 3, "concepts": 2, "evidence": 0.5}


def on_config(config: Any) -> Any:
    """Add the extension of our own to Markdown's."""
    config["markdown_extensions"].append(LabelledCells())
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put generated text in the places that name it. An unknown name ends the build with a KeyError."""
    boost = _BOOSTS.get(page.file.src_uri.partition("/")[0], 1)
    page.meta.setdefault("search", {"boost": boost})
    return _PLACE.sub(lambda found: FRAGMENTS[found["name"]](), markdown)
