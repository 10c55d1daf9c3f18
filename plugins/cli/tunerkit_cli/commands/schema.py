"""``tunerkit schema``."""

import json

import typer

from tunerkit_cli.recipes import schema as recipe_schema


def schema() -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks them."""
    typer.echo(json.dumps(recipe_schema.schema(), indent=2))
