"""``tunerkit doctor``."""

import typer
from rich.console import Console


def doctor() -> None:
    """Show versions, devices, plugins with their errors, and optional parts. Exits with 1 if a plugin is broken."""
    from tunerkit_cli import installed

    if not installed.show(Console()):
        raise typer.Exit(1)
