"""``tunerkit config``."""

from pathlib import Path
from typing import Annotated

import typer

import tunerkit
from tunerkit_cli import settings


def config(
    method: Annotated[str, typer.Argument(help="The method.")] = "adalora",
    file: Annotated[Path | None, typer.Option("--config", help="A settings file to check and complete.")] = None,
) -> None:
    """Print a method's settings as YAML, for `tunerkit train --config`: the defaults, or those in a file."""
    given = settings.read_settings(file) if file is not None else {}
    typer.echo(settings.write_settings(tunerkit.unstructure(tunerkit.structure(method, given))), nl=False)
