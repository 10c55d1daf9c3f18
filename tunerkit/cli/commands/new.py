"""``tunerkit new``."""

from pathlib import Path
from typing import Annotated

import typer


def new(
    method: Annotated[str, typer.Argument(help="The new method's name, such as my-method.")],
    low_rank: Annotated[bool, typer.Option("--low-rank", help="Two matrices of a low rank, the default.")] = False,
    scale: Annotated[bool, typer.Option("--scale", help="A factor per feature of a target's output.")] = False,
    scheduled: Annotated[bool, typer.Option("--scheduled", help="Low-rank, with a rank that falls.")] = False,
    into: Annotated[Path, typer.Option(help="The folder to write the distribution's own folder into.")] = Path(),
) -> None:
    """Write a distribution with a new method, which installs and passes the conformance tests as it is."""
    from tunerkit.cli.new import NewMethodError, files_to_edit, write_distribution

    chosen = [name for name, given in (("low-rank", low_rank), ("scale", scale), ("scheduled", scheduled)) if given]
    if len(chosen) > 1:
        raise NewMethodError(f"choose one template, got {' and '.join(f'--{name}' for name in chosen)}")
    variant = chosen[0] if chosen else "low-rank"
    folder = write_distribution(method, variant, into)
    typer.echo(f"written to {folder}; it works as it is: pip install -e '{folder}[test]' && tunerkit check {method}")
    typer.echo("Then make it yours:")
    for path, what in files_to_edit(method, variant).items():
        typer.echo(f"  {path}: {what}")
