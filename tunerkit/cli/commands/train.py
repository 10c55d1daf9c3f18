"""``tunerkit train``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tunerkit import TunerkitError
from tunerkit.cli import settings
from tunerkit.cli.recipe import Recipe

_DEFAULT = Recipe()


def train(
    method: Annotated[str, typer.Option(help="The method. `tunerkit methods` lists the installed ones.")] = "adalora",
    model: Annotated[str | None, typer.Option(help="A local folder or a hub name. Default: all-MiniLM-L6-v2.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="The training data: .csv, .jsonl or .parquet. Default: movie sentences.")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="The held-out data. Default: a fifth of --data.")] = None,
    text_column: Annotated[str, typer.Option(help="The name of the text column.")] = "text",
    label_column: Annotated[str, typer.Option(help="The name of the label column.")] = "label",
    config: Annotated[
        Path | None, typer.Option(help="The method's settings, as YAML or JSON. `tunerkit config` prints them.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The output folder: adapter, metrics and plots.")] = Path("out"),
    epochs: Annotated[int, typer.Option(min=1)] = _DEFAULT.epochs,
    lr: Annotated[float, typer.Option(help="The peak learning rate.")] = _DEFAULT.learning_rate,
    batch_size: Annotated[int, typer.Option(min=1)] = _DEFAULT.batch_size,
    max_length: Annotated[int, typer.Option(min=4, help="Longer texts are truncated to this many tokens.")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = _DEFAULT.seed,
    baseline: Annotated[bool, typer.Option(help="Also train the head alone, for comparison.")] = True,
) -> None:
    """Train a text classifier's adapter. Without options: all-MiniLM-L6-v2 on movie sentiment, with AdaLoRA."""
    if not 0 < lr < float("inf"):
        raise TunerkitError(f"--lr: expected a number above 0, got {lr}")
    given = settings.read_settings(config) if config is not None else {}
    from tunerkit.cli import job
    from tunerkit.cli.task import Job

    chosen = Job(
        out=out,
        method=method,
        settings=given,
        model=model,
        data=data,
        eval_data=eval_data,
        text_column=text_column,
        label_column=label_column,
        max_length=max_length,
        baseline=baseline,
        recipe=Recipe(epochs=epochs, learning_rate=lr, batch_size=batch_size, seed=seed),
    )
    job.run(chosen, Console())
