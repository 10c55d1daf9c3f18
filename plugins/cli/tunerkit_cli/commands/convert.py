"""``tunerkit convert``."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Argument(help="An adapter in any format: a folder or a file.", metavar="SRC")],
    to: Annotated[str, typer.Option(help="The new format, such as peft; tunerkit is its own file.")],
    out: Annotated[Path, typer.Option(help="A folder, or a file where the format writes one.")],
    base: Annotated[
        str | None, typer.Option(help="The folder of the base model. Default: what the adapter's files say.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The adapter's task, if its files do not say it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the format, as in --set form=compact.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older adapter at --out; a model is never overwritten.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write an adapter in another format. No weights of the base model are read."""
    from tunerkit_cli.converting.conversion import convert_adapter
    from tunerkit_cli.converting.printing import print_converted

    found = convert_adapter(source, to=to, out=out, base=base, task=task, options=set_ or [], overwrite=overwrite)
    print_converted(found, as_json=json)
