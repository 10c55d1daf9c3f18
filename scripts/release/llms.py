"""Writes llms.txt, a short map of the documentation for language models: ``python -m scripts.release.llms``."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from scripts.release.building import ROOT, address

FILE: Final = ROOT / "llms.txt"
HEAD: Final = """\
# tunerkit

> {description}

A model is wrapped in place: `tunerkit.wrap(model, "adalora")`, `tunerkit.attach(model, optimizer_or_trainer)`, train as
always, `tunerkit.save(model, "out")`, `tunerkit.load(base, "out")`, `tunerkit.merge(model)`. Each method is a plugin in
its own distribution; `tunerkit.methods()` lists what is installed.
"""
_FURTHER: Final = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose settings may name Python objects, which are not needed here."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def groups(configuration: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The groups of the site's navigation, each with the titles and paths of its pages.

    Args:
        configuration: The text of mkdocs.yml.
    """
    loose: list[tuple[str, str]] = []
    for entry in yaml.load(configuration, _Loader)["nav"]:
        title, inside = _titled(entry)
        if isinstance(inside, str):
            loose.append((title, inside))
        else:
            yield title, list(_pages(inside))
    if loose:
        yield "Pages", loose


def _pages(entries: list[Any]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        title, inside = _titled(entry)
        if isinstance(inside, str):
            yield title, inside
        else:
            yield from _pages(inside)


def _titled(entry: Any) -> tuple[str, Any]:
    if isinstance(entry, str):
        return Path(entry).stem.replace("-", " ").capitalize(), entry
    ((title, inside),) = entry.items()
    return title, inside


def first_sentence(page: str) -> str:
    """The first sentence of a page's first paragraph, without marks; empty if it begins with none."""
    plain = re.sub(r"^(---\n.*?\n---\n|<!--.*?-->)", "", page, flags=re.DOTALL)
    paragraphs = (part.strip() for part in plain.split("\n\n"))
    text = next((part for part in paragraphs if re.match(r"[A-Z`*\[]", part)), "")
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)|\*\*|\n", lambda found: found[1] or " " * (found[0] == "\n"), text)
    return re.split(r"(?<=[.?!])\s", words)[0].rstrip(":")


def text(repository: str) -> str:
    """The whole map. Links are relative to the root of the repository unless it has an address."""
    before = f"{repository}/blob/main/" if repository else ""
    description = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["description"]
    parts = [HEAD.format(description=description)]
    for group, pages in groups((ROOT / "mkdocs.yml").read_text("utf-8")):
        lines = []
        for title, path in pages:
            said = first_sentence((ROOT / "docs" / path).read_text("utf-8"))
            lines.append(f"- [{title}]({before}docs/{path})" + (f": {said}" if said else ""))
        parts.append("\n".join([f"## {group}\n", *lines, ""]))
    further = [f"- [{path}]({before}{path})" for path in _FURTHER]
    return "\n".join([*parts, "## Repository\n", *further, ""])


if __name__ == "__main__":
    FILE.write_text(text(address()), "utf-8")
