"""``tunerkit eval``."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    folder: Annotated[Path, typer.Argument(help="The output folder of `tunerkit train`.", metavar="OUT")],
    data: Annotated[
        list[Path], typer.Option(help="Rows with the columns of training, labels included; may be given several times.")
    ],
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Evaluate a trained adapter on labelled rows: the metrics as JSON."""
    import json

    from tunerkit_cli.running.using import evaluate_rows

    typer.echo(json.dumps(evaluate_rows(folder, data, base=base, batch_size=batch_size), indent=2))
