"""What this adds to the command ``tunerkit``: ``check`` and ``new``.

``tunerkit --help`` imports this file, so torch is imported inside the functions.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tunerkit.plugin import hookimpl


@hookimpl
def tunerkit_commands() -> Mapping[str, Callable[..., object]]:
    """Add the commands for authors of methods."""
    return {"new": new, "check": check}


def check(
    method: Annotated[
        str,
        typer.Argument(
            help="A method of `tunerkit methods`, or its plugin: my_package.loha:loha, or a module, my.gra."
        ),
    ],
    config: Annotated[
        str, typer.Option(help="Its settings: a file in YAML or JSON, or written out, as in '{\"rank\": 2}'.")
    ] = "{}",
    case: Annotated[
        list[str] | None, typer.Option(help="A model to check it on; may be repeated. Default: bert, gpt2 and llama.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="The learning rate at which the models train. Default: each model's own.")
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
    from tunerkit_cli.plugin import given_settings

    given = given_settings(config)
    from tunerkit_testing import checking

    if not checking.run(Console(), method, given, case or [], only or [], expected_failure or [], lr):
        raise typer.Exit(1)


def new(
    method: Annotated[str, typer.Argument(help="The new method's name, such as my-method.")],
    form: Annotated[
        str,
        typer.Option(
            help="function: one function that returns ΔW; hooks: a config, an adapter and hooks; scheduled: the same "
            "with a rank that falls during training."
        ),
    ] = "function",
    into: Annotated[Path, typer.Option(help="The folder to write the distribution's own folder into.")] = Path(),
) -> None:
    """Write a distribution with a new method, which installs and passes the conformance tests as it is."""
    from tunerkit_testing.new import files_to_edit, write_distribution

    folder = write_distribution(method, form, into)
    typer.echo(f"written to {folder}; it works as it is: pip install -e '{folder}[test]' && tunerkit check {method}")
    typer.echo("Then make it yours:")
    for path, what in files_to_edit(method, form).items():
        typer.echo(f"  {path}: {what}")
