"""``tunerkit show``."""

from pathlib import Path
from typing import Annotated

import typer


def show(
    folder: Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.", metavar="OUT")],
) -> None:
    """Show what a folder holds: method, base, ranks, sizes, config and training."""
    from rich.console import Console

    from tunerkit.cli.running.showing import show_run

    show_run(folder, Console())
