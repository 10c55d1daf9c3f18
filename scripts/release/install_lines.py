"""The commands in pages that install our distributions: each says what works today, as `tunerkit.extras` knows it.

    python -m scripts.release.install_lines --write    # after a change of PUBLISHED

Without the option, it says what is wrong.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from scripts.release.building import ROOT
from tunerkit.extras import FROM

PAGES: Final = ("*.md", "llms.txt", "docs/**/*.md", "docs/**/*.ipynb", "plugins/*/README.md", "examples/**/*.md")
# CHANGELOG.md says what was.
_HISTORY: Final = ("CHANGELOG.md",)
_COMMAND: Final = re.compile(r"(?P<tool>\bpip install|\buv add) (?P<rest>[^\n`#]*)")
_PLUGIN: Final = re.compile(r"""(?<!-e )(?<![\w./-])["']?tunerkit-([a-z]+)["']?(?![\w./\[-])""")
# The line before it, for as long as the wheels must be built.
_BUILD: Final = "make dist  # in a clone: tunerkit is on no index yet\n"
_FOLDER: Final = re.compile(r"(?:--find-links|-f)[ =](\S+) ?")
# What a command takes from an index or a folder; a path after -e is no such word.
_OURS: Final = re.compile(r"""(?<!-e )(?<![\w./-])["'\\]*tunerkit(?:-[a-z]+)?(?:\[[\w,-]+\])?(?![\w./-])""")


def pages() -> Iterator[Path]:
    """Every page that may tell how to install."""
    for pattern in PAGES:
        yield from (page for page in sorted(ROOT.glob(pattern)) if page.name not in _HISTORY)


def problems(text: str, found_from: str = FROM) -> list[str]:
    """Say of each command that installs ours what is wrong with it.

    Args:
        text: The page.
        found_from: The option that names where our distributions are found; empty for an index.
    """
    right = ((command[0], _mended(command, found_from)) for command in _COMMAND.finditer(text))
    return [f"{written.strip()}: write {wanted.strip()}" for written, wanted in right if written != wanted]


def mended(text: str, found_from: str = FROM) -> str:
    """The page with commands that find our distributions where they are, each by its extra."""
    kept = text if found_from else text.replace(_BUILD, "")
    return _COMMAND.sub(lambda command: _mended(command, found_from), kept)


def _mended(command: re.Match[str], found_from: str) -> str:
    rest = _PLUGIN.sub(r'"tunerkit[\1]"', command["rest"])
    if _OURS.search(rest) and bool(_FOLDER.search(rest)) != bool(found_from):
        rest = f"{found_from}{_FOLDER.sub('', rest)}"
    return f"{command['tool']} {rest}"


def main() -> None:
    """Write the pages again, or say what is wrong with them."""
    wrong = []
    for page in pages():
        text = page.read_text("utf-8")
        if "--write" in sys.argv[1:] and page.suffix != ".ipynb":  # a notebook's text is inside JSON
            page.write_text(text := mended(text), "utf-8")
        wrong += [f"{page.relative_to(ROOT)}: {problem}" for problem in problems(text)]
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
