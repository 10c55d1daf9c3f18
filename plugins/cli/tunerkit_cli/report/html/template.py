"""The templates, filled in: the only place that knows jinja2."""

import functools
from pathlib import Path
from typing import Any, Final

import jinja2

from tunerkit_cli.report import wording

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_NAME: Final = 60


def filled(name: str, values: dict[str, Any]) -> str:
    """Fill in a template. Values are escaped, and characters that HTML forbids are replaced."""
    page = _environment().get_template(name).render(values)
    # A lone surrogate in a label could not be written as UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8").translate(_unprintable())


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = functools.partial(wording.short_text, width=_LONGEST_NAME)
    return environment


@functools.cache
def _unprintable() -> dict[int, str]:
    allowed = (0x9, 0xA, 0xD)
    controls = (*range(0x20), *range(0x7F, 0xA0), 0xFFFE, 0xFFFF)
    return {code: "\N{REPLACEMENT CHARACTER}" for code in controls if code not in allowed}
