"""The commands on the files of adapters, in any format: show, convert, verify, diff and merge."""

from pathlib import Path
from typing import Annotated

import typer

_Adapter = Annotated[str, typer.Argument(help="An adapter in any format.", metavar="A")]
_Base = Annotated[str | None, typer.Option(help="The folder of the base model. Default: what the adapter's files say.")]
_Task = Annotated[str | None, typer.Option(help="The adapter's task, if its files do not say it.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Source = Annotated[
    str, typer.Argument(help="The output folder of `tunerkit train`, or an adapter in any format.", metavar="SRC")
]


def show(source: _Source, json: _Json = False) -> None:
    """Show what an adapter is: method, base, ranks, size and config; of an output folder also its training."""
    from tunerkit_cli.converting.printing import show_adapter

    show_adapter(source, as_json=json)


def convert(
    source: Annotated[str, typer.Argument(help="An adapter in any format: a folder or a file.", metavar="SRC")],
    to: Annotated[
        str, typer.Option(help="The new format, such as peft; tunerkit is its own file, and lora a LoRA in it.")
    ],
    out: Annotated[Path, typer.Option(help="A folder, or a file where the format writes one.")],
    base: _Base = None,
    task: _Task = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the format, as in --set form=compact.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="With --to lora: the rank of the closest LoRA; the error is printed.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older adapter at --out; a model is never overwritten.")
    ] = False,
    json: _Json = False,
) -> None:
    """Write an adapter in another format. No weights of the base model are read, except by --to lora if needed."""
    from tunerkit_cli.converting.conversion import convert_adapter
    from tunerkit_cli.converting.printing import print_converted

    options = set_ or []
    found = convert_adapter(
        source, to=to, out=out, base=base, task=task, options=options, rank=rank, overwrite=overwrite
    )
    print_converted(found, as_json=json)


def verify(
    one: _Adapter,
    other: Annotated[
        str, typer.Argument(help="An adapter in any format, or the folder of a merged model.", metavar="B")
    ],
    base: Annotated[
        str | None, typer.Option(help="The folder of the base model. Default: what the files of A say, or those of B.")
    ] = None,
    task: _Task = None,
    tolerance: Annotated[
        float, typer.Option(help="The largest difference, relative to the largest output of A.")
    ] = 1e-5,
    json: _Json = False,
) -> None:
    """Run two adapters on the same random inputs, and compare the outputs. The exit code is 1 if they differ."""
    from tunerkit_cli.converting.printing import print_verified
    from tunerkit_cli.converting.verification import verify_adapters

    found = verify_adapters(one, other, base=base, task=task, tolerance=tolerance)
    print_verified(found, as_json=json)
    if not found.is_equal:
        raise typer.Exit(1)


def diff(
    one: _Adapter,
    other: Annotated[str, typer.Argument(help="An adapter in any format.", metavar="B")],
    base: _Base = None,
    task: _Task = None,
    json: _Json = False,
) -> None:
    """Compare what two adapters hold, without running a model. The exit code is 1 if they add something different."""
    from tunerkit_cli.converting.comparison import compare_adapters
    from tunerkit_cli.converting.printing import print_compared

    found = compare_adapters(one, other, base=base, task=task)
    print_compared(found, as_json=json)
    if not found.is_equal:
        raise typer.Exit(1)


def merge(
    source: _Source,
    out: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    base: _Base = None,
    task: _Task = None,
) -> None:
    """Merge an adapter into its base: a plain model folder, which needs no tunerkit."""
    from tunerkit_cli.converting import conversion

    for remark in conversion.merge(source, out, base=base, task=task):
        typer.echo(f"note: {remark}")
    reader = "SentenceTransformer" if (out / "modules.json").is_file() else "from_pretrained or pipeline"
    typer.echo(f"written to {out}: load it with {reader}")
