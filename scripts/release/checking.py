"""Installs the built wheels into a clean venv outside the clone, and runs the first steps and the command there."""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Final

from scripts.release.building import projects, version

FIRST_STEPS: Final = Path(__file__).with_name("first_steps.py")
COMMANDS: Final = ("--version", "methods", "doctor")


def check(folder: Path, borrowed: Path | None) -> None:
    """Install everything from a folder of wheels, and run it; the first thing that fails ends the check.

    Args:
        folder: The folder that `scripts.release build` wrote.
        borrowed: A venv whose packages, ours apart, are linked into the clean one, so that torch need not be installed
            again. pip then asks no index.
    """
    with tempfile.TemporaryDirectory(prefix="tunerkit-check-") as scratch:
        root = Path(scratch)
        environment, empty = root / "venv", root / "empty"
        empty.mkdir()
        begin = time.perf_counter()
        venv.create(environment, with_pip=borrowed is None)
        if borrowed is not None:
            lend(borrowed, environment)
        print(f"{time.perf_counter() - begin:7.1f} s  python -m venv")
        python = str(environment / "bin/python")
        report = root / "report.json"
        options = ["--no-index"] if borrowed is not None else []
        _run(
            *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options),
            *("--find-links", str(folder), "--report", str(report), f"tunerkit[all]=={version()}"),
            within=empty,
        )
        if wrong := strangers(json.loads(report.read_text("utf-8")), folder):
            raise SystemExit("not installed from the folder:\n" + "\n".join(wrong))
        _run(python, "-m", "pip", "check", within=empty)
        _run(python, "-I", str(FIRST_STEPS), within=empty, shown=True)
        for command in COMMANDS:
            _run(str(environment / "bin/tunerkit"), command, within=empty, shown=command != "doctor")
        _run(python, "-m", "tunerkit", "methods", within=empty)
        _run(str(environment / "bin/tunerkit"), "new", "my-method", within=empty)


def lend(lender: Path, borrower: Path) -> None:
    """Let one venv import what another has, pip too, except what is ours, which must come from the wheels.

    The links lie in a folder of their own, named by a .pth file: pip never removes what lies outside its venv.
    """
    links = borrower / "lent"
    links.mkdir()
    for each in _packages(lender).iterdir():
        if "tunerkit" not in each.name:
            (links / each.name).symlink_to(each)
    (_packages(borrower) / "lent.pth").write_text(f"{links}\n", "utf-8")


def _packages(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def strangers(report: dict[str, list[dict[str, dict[str, str]]]], folder: Path) -> list[str]:
    """Which of our distributions pip's report of an installation does not have, or has from elsewhere."""
    ours = {
        each["metadata"]["name"]: each["download_info"]["url"]
        for each in report["install"]
        if each["metadata"]["name"].startswith("tunerkit")
    }
    wanted = ["tunerkit", *(f"tunerkit-{each.name}" for each in projects()[1:])]
    wrong = [f"{name}: {url}" for name, url in ours.items() if not url.startswith(f"{folder.as_uri()}/")]
    return wrong + [f"{name}: missing" for name in wanted if name not in ours]


def _run(*command: str, within: Path, shown: bool = False) -> None:
    """Run a command in a folder, without the caller's Python paths, and print how long it took."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TUNERKIT"))}
    begin = time.perf_counter()
    done = subprocess.run(
        command, cwd=within, env={**kept, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    words = [Path(word).name if word.startswith("/") else word for word in command]
    print(f"{time.perf_counter() - begin:7.1f} s  {' '.join(words)}")
    if shown or done.returncode:
        print(done.stdout + (done.stderr if done.returncode else ""), end="")
    if done.returncode:
        raise SystemExit(f"failed with code {done.returncode}: {' '.join(words)}")
