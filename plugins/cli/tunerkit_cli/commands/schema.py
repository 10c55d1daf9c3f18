"""``tunerkit schema``."""

import json

import typer

from tunerkit_cli.recipes import reading


def schema() -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks them."""
    typer.echo(json.dumps(reading.schema(), indent=2))
