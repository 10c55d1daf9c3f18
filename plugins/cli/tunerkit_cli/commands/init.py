"""``tunerkit init``."""

from pathlib import Path
from typing import Annotated

import typer

from tunerkit_cli.recipes import writing
from tunerkit_cli.recipes.recipe import TASKS


def init(
    task: Annotated[str, typer.Argument(help=f"The task: {', '.join(TASKS)}.")],
    out: Annotated[Path | None, typer.Option(help="A new file to write it to, such as recipe.yaml.")] = None,
) -> None:
    """Print a commented recipe for a task to start from, or write it to a file."""
    if out is None:
        typer.echo(writing.starter(task), nl=False)
    else:
        writing.write_starter(task, out)
        typer.echo(f"written to {out}; set model and data in it")
