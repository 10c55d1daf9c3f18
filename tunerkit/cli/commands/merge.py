"""``tunerkit merge``."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    folder: Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.", metavar="OUT")],
    out: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
) -> None:
    """Merge a trained adapter into its base: a plain model folder, which needs no tunerkit."""
    from tunerkit.cli.running.using import write_merged

    write_merged(folder, out, base=base)
    typer.echo(f"written to {out}: load it with from_pretrained or pipeline")
