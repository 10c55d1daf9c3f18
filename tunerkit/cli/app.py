"""The command line: parses the options and starts one job."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import tunerkit
from tunerkit import TunerkitError
from tunerkit.cli import checking, job, settings
from tunerkit.cli.new import NewMethodError, write_distribution
from tunerkit.cli.task import Job
from tunerkit.cli.training import Recipe

# Changes while this file is imported, and never after: typer notes the commands below in it.
app = typer.Typer(
    help="Fine-tune a model through small adapters; every method is a plugin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_DEFAULT = Recipe()


def run() -> None:
    """Run the command ``tunerkit``."""
    app()


@app.command()
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
    with one_line_errors():
        if not 0 < lr < float("inf"):
            raise TunerkitError(f"--lr: expected a number above 0, got {lr}")
        chosen = Job(
            out=out,
            method=method,
            settings=settings.read_settings(config) if config is not None else {},
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


@app.command()
def methods() -> None:
    """List the installed methods. A plugin that failed to load is listed with its error."""
    table = Table("method", "distribution", "version", "error")
    for name, info in tunerkit.methods().items():
        table.add_row(name, info.distribution, info.version, info.error or "")
    Console().print(table)


@app.command()
def config(
    method: Annotated[str, typer.Argument(help="The method.")] = "adalora",
    file: Annotated[Path | None, typer.Option("--config", help="A settings file to check and complete.")] = None,
) -> None:
    """Print a method's settings as YAML, for `tunerkit train --config`: the defaults, or those in a file."""
    with one_line_errors():
        given = settings.read_settings(file) if file is not None else {}
        typer.echo(settings.write_settings(tunerkit.unstructure(tunerkit.structure(method, given))), nl=False)


@app.command()
def new(
    method: Annotated[str, typer.Argument(help="The new method's name, such as my-method.")],
    low_rank: Annotated[bool, typer.Option("--low-rank", help="Two matrices of a low rank, the default.")] = False,
    scale: Annotated[bool, typer.Option("--scale", help="A factor per feature of a target's output.")] = False,
    scheduled: Annotated[bool, typer.Option("--scheduled", help="Low-rank, with a rank that falls.")] = False,
    into: Annotated[Path, typer.Option(help="The folder to write the distribution's own folder into.")] = Path(),
) -> None:
    """Write a distribution with a new method, which installs and passes the conformance tests as it is."""
    with one_line_errors():
        chosen = [name for name, given in (("low-rank", low_rank), ("scale", scale), ("scheduled", scheduled)) if given]
        if len(chosen) > 1:
            raise NewMethodError(f"choose one template, got {' and '.join(f'--{name}' for name in chosen)}")
        folder = write_distribution(method, chosen[0] if chosen else "low-rank", into)
        typer.echo(f"written to {folder}; next: pip install -e '{folder}[test]' && tunerkit check {method}")


@app.command()
def check(
    method: Annotated[str, typer.Argument(help="The method. `tunerkit methods` lists the installed ones.")],
    config: Annotated[
        str, typer.Option(help="Its settings: a file in YAML or JSON, or written out, as in '{\"rank\": 2}'.")
    ] = "{}",
    case: Annotated[
        list[str] | None, typer.Option(help="A model to check it on; may be repeated. Default: bert and llama.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--check", help="A check to run; may be repeated. Default: all.")
    ] = None,
) -> None:
    """Check that a method keeps the contract of plugins, on small models. The exit code is 1 if a check failed."""
    with one_line_errors():
        if not checking.run(Console(), method, settings.given_settings(config), case or [], only or []):
            raise typer.Exit(1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `TunerkitError` as one line on stderr and exit with code 2, without a traceback."""
    try:
        yield
    except TunerkitError as problem:
        print(f"tunerkit: {'; '.join(str(problem).splitlines())}", file=sys.stderr)
        raise typer.Exit(2) from None
