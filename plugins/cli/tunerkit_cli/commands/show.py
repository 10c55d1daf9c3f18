"""``tunerkit show``."""

from typing import Annotated

import typer


def show(
    source: Annotated[
        str, typer.Argument(help="The output folder of `tunerkit train`, or an adapter in any format.", metavar="SRC")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what an adapter is: method, base, ranks, size and config; of an output folder also its training."""
    from rich.console import Console

    from tunerkit_cli.running.showing import show_adapter

    show_adapter(source, Console(), as_json=json)
