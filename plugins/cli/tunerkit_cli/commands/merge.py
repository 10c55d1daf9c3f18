"""``tunerkit merge``."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    source: Annotated[
        str, typer.Argument(help="The output folder of `tunerkit train`, or an adapter in any format.", metavar="SRC")
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    base: Annotated[
        str | None, typer.Option(help="The folder of the base model. Default: what the adapter's files say.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The adapter's task, if its files do not say it.")] = None,
) -> None:
    """Merge an adapter into its base: a plain model folder, which needs no tunerkit."""
    from tunerkit_cli.running.using import write_merged

    for remark in write_merged(source, out, base=base, task=task):
        typer.echo(f"note: {remark}")
    typer.echo(f"written to {out}: load it with from_pretrained or pipeline")
