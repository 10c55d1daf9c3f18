"""``tunerkit verify``."""

from typing import Annotated

import typer


def verify(
    one: Annotated[str, typer.Argument(help="An adapter in any format.", metavar="A")],
    other: Annotated[
        str, typer.Argument(help="An adapter in any format, or the folder of a merged model.", metavar="B")
    ],
    base: Annotated[
        str | None, typer.Option(help="The folder of the base model. Default: what the files of A say, or those of B.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The adapters' task, if the files do not say it.")] = None,
    tolerance: Annotated[
        float, typer.Option(help="The largest difference, relative to the largest output of A.")
    ] = 1e-5,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run two adapters on the same random inputs, and compare the outputs. The exit code is 1 if they differ."""
    from tunerkit_cli.converting.printing import print_verified
    from tunerkit_cli.converting.verification import verify_adapters

    found = verify_adapters(one, other, base=base, task=task, tolerance=tolerance)
    print_verified(found, as_json=json)
    if not found.is_equal:
        raise typer.Exit(1)
