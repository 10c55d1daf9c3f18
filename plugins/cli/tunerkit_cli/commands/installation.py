"""The commands that need no run: what is installed, and what settings and recipes look like."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import tunerkit
from tunerkit_cli import settings
from tunerkit_cli.recipes import reading, writing
from tunerkit_cli.recipes.recipe import DEFAULT_METHOD, TASKS
from tunerkit_cli.recipes.schema import settings_schema


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


def schema(
    name: Annotated[
        str | None, typer.Argument(help="A method, whose settings `config` then has; or a task, for a row of its data.")
    ] = None,
) -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks them, or rows of a task's data."""
    if name in TASKS:
        for row in writing.example_rows(name):
            typer.echo(json.dumps(row, ensure_ascii=False))
        return
    found, method = reading.schema(), name
    if method is not None:
        config = found["properties"]["config"]
        from tunerkit import hooks  # imports torch

        own = settings_schema(hooks.registry.get(hooks.registry.named(method)).config)
        config |= {**own, "type": config["type"], "description": config["description"], "default": config["default"]}
    typer.echo(json.dumps(found, indent=2))


def config(
    method: Annotated[str, typer.Argument(help="The method.")] = DEFAULT_METHOD,
    file: Annotated[Path | None, typer.Option("--config", help="A settings file to check and complete.")] = None,
) -> None:
    """Print a method's settings as YAML, for `tunerkit train --config`: the defaults, or those in a file."""
    given = settings.read_settings(file) if file is not None else {}
    typer.echo(settings.write_settings(tunerkit.unstructure(tunerkit.structure(method, given))), nl=False)


def methods() -> None:
    """List the installed methods. A plugin that failed to load is listed with its error."""
    from tunerkit_cli import installed

    Console().print(installed.methods_table())


def doctor(context: typer.Context) -> None:
    """Show versions, devices, plugins with their errors, and optional parts. Exits with 1 if a plugin is broken."""
    from tunerkit_cli import installed

    if not installed.show(Console(), context.obj):
        raise typer.Exit(1)
