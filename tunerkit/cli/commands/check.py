"""``tunerkit check``."""

from typing import Annotated

import typer
from rich.console import Console

from tunerkit.cli import settings


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
    expected_failure: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK=REASON", help="A check that is expected to fail, and why; may be repeated."),
    ] = None,
) -> None:
    """Check that a method keeps the contract of plugins, on small models. The exit code is 1 if it does not."""
    given = settings.given_settings(config)
    from tunerkit.cli import checking

    if not checking.run(Console(), method, given, case or [], only or [], expected_failure or []):
        raise typer.Exit(1)
