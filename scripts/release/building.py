"""Builds the wheel and the sdist of every distribution, from a copy of the tree with the links that an index shows."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PARTS: Final = ("tunerkit", "plugins", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")
_JUNK: Final = shutil.ignore_patterns("__pycache__", "*.egg-info")
_LINK: Final = re.compile(r"(!?)\[([^\[\]]*)\]\((?!\w+:|#)([^()\s]+)\)")


def version() -> str:
    """The version of all distributions: that of the core."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "tunerkit/__init__.py").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("tunerkit/__init__.py has no line __version__ = ...")
    return found[1]


def address() -> str:
    """The address of the repository, from ``[tool.tunerkit]`` in pyproject.toml; empty while it has none."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["tunerkit"]["repository"]
    return str(found).rstrip("/")


def refuse_tag(tag: str) -> None:
    """Stop a release whose tag is another version, or that messages and pages deny."""
    if tag != f"v{version()}":
        raise SystemExit(f"the tag is {tag}, and the version in tunerkit/__init__.py is {version()}")
    if "PUBLISHED: Final = True" not in (ROOT / "tunerkit/extras.py").read_text("utf-8"):
        raise SystemExit("PUBLISHED in tunerkit/extras.py is False: make it True, run `make pages`, tag that commit")


def projects(root: Path = ROOT) -> list[Path]:
    """The folders of all distributions, the core first."""
    return [root, *(each.parent for each in sorted(root.glob("plugins/*/pyproject.toml")))]


def urls(repository: str) -> str:
    """The table ``[project.urls]``; an empty text while the repository has no address."""
    if not repository:
        return ""
    pages = {"Source": "", "Documentation": "/tree/main/docs", "Changelog": "/blob/main/CHANGELOG.md"}
    return "".join(["\n[project.urls]\n", *(f'{name} = "{repository}{path}"\n' for name, path in pages.items())])


def for_the_index(page: str, folder: str, repository: str) -> str:
    """A README as an index shows it, far from the files that its links lead to.

    Args:
        page: The text.
        folder: The folder of the README below the root; empty for the root.
        repository: The address that links get; if it is empty, only their words stay, and no picture.
    """

    def link(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        if not repository:
            return "" if picture else words
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/main/{_joined(folder, path)})"

    return _LINK.sub(link, page)


def _joined(folder: str, path: str) -> str:
    parts: list[str] = []
    for part in (*folder.split("/"), *path.split("/")):
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def stage(into: Path, repository: str) -> None:
    """Copy what distributions are built from, and add what an index needs."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, into / part, ignore=_JUNK)
        else:
            shutil.copy2(source, into / part)
    for project in projects(into):
        with (project / "pyproject.toml").open("a", encoding="utf-8") as file:
            file.write(urls(repository))
        readme = project / "README.md"
        folder = "" if project == into else project.relative_to(into).as_posix()
        readme.write_text(for_the_index(readme.read_text("utf-8"), folder, repository), "utf-8")


def build(folder: Path) -> None:
    """Write the wheels and sdists of all distributions into a folder; those of other builds are removed from it.

    Each wheel is built from its sdist, in a folder outside the tree: so every sdist is known to be complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("tunerkit*.whl"), *folder.glob("tunerkit*.tar.gz")):
        old.unlink()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch)
        stage(tree, address())
        for project in projects(tree):
            command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(project)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{project.name} was not built:\n{done.stdout}{done.stderr}")
    files = sorted(each.name for each in folder.iterdir())
    print("\n".join(files))
    print(f"{len(files)} files in {folder}, built in {time.perf_counter() - begin:.1f} s")
