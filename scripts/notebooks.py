"""The pages that are notebooks too: ``python -m scripts.notebooks`` writes each notebook from its page."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = ("start/tutorial", "start/rank-map", "how-to/classify", "how-to/chat", "how-to/images")
PAGES = tuple(ROOT / f"docs/{name}.md" for name in NAMES)
# A sentence that makes no sense in the notebook: it leads to the notebook.
_TO_THE_NOTEBOOK = re.compile(r"^The same as a notebook:.*?\n\n", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """A page as a notebook without outputs: each block marked ``python`` is a cell of code, the rest is Markdown.

    A page's blocks are separated by its text, so splitting by them gives text and code in turn.
    """
    cells: list[dict[str, Any]] = []
    for number, text in enumerate(_CODE.split(_TO_THE_NOTEBOOK.sub("", page))):
        if text.strip():
            cells.append(_cell("code" if number % 2 else "markdown", text.strip("\n"), f"cell-{len(cells)}"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _cell(kind: str, text: str, name: str) -> dict[str, Any]:
    of_code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": {}, **of_code, "source": text.splitlines(keepends=True)}


def written(page: Path) -> str:
    """The text of a page's notebook file."""
    made = notebook(page.read_text(encoding="utf-8"))
    return json.dumps(made, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    for each in PAGES:
        each.with_suffix(".ipynb").write_text(written(each), encoding="utf-8")
        print(f"{each.with_suffix('.ipynb').relative_to(ROOT)} is written from {each.name}")
