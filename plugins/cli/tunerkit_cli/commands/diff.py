"""``tunerkit diff``."""

from typing import Annotated

import typer


def diff(
    one: Annotated[str, typer.Argument(help="An adapter in any format.", metavar="A")],
    other: Annotated[str, typer.Argument(help="An adapter in any format.", metavar="B")],
    base: Annotated[
        str | None, typer.Option(help="The folder of the base model. Default: what the adapters' files say.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The adapters' task, if the files do not say it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare what two adapters hold, without running a model. The exit code is 1 if they add something different."""
    from tunerkit_cli.converting.comparison import compare_adapters
    from tunerkit_cli.converting.printing import print_compared

    found = compare_adapters(one, other, base=base, task=task)
    print_compared(found, as_json=json)
    if not found.is_equal:
        raise typer.Exit(1)
