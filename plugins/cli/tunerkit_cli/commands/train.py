"""``tunerkit train``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tunerkit import TunerkitError
from tunerkit_cli.recipes import reading, setting
from tunerkit_cli.recipes.recipe import TASKS


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, as `tunerkit init` writes it. Options replace its values.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(TASKS)}. Default: what the data asks for.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="The method. `tunerkit methods` lists the installed ones. Default: lora, and adalora without --data."
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Go on training an adapter: an output folder, a file of tunerkit's, or a PEFT folder. Its method and "
            "settings stay. Default: train a new one.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A local folder or a hub name. Default: all-MiniLM-L6-v2.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A .csv, .tsv, .json, .jsonl or .parquet file, or a folder of images; may be given several times. "
            "Default: movie sentences."
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(help="The held-out data; may be given several times. Default: a fifth of --data."),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="The name of the text column. Default: text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="The name of the label column. Default: label.")] = None,
    config: Annotated[
        str | None, typer.Option(help="The method's settings, as YAML or JSON: a file, or written out.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The output folder. Default: out.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Default: 3; for language models 1.")] = None,
    lr: Annotated[float | None, typer.Option(help="The peak learning rate. Default: as the task needs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 32; for language models 8.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=4, help="Longer texts are truncated to this many tokens.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="What matrix products are computed in: fp32, bf16 or fp16. Default: fp32 on a CPU, bf16 on an "
            "accelerator that has it."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Default: 0.")] = None,
    baseline: Annotated[
        bool | None, typer.Option(help="Also train the head alone, for comparison. Default: only without --data.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any key of a recipe, as in --set training.warmup_steps=10.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show data, lengths, steps and parameters, and stop.")
    ] = False,
) -> None:
    """Train an adapter, by default with LoRA. Without options: all-MiniLM-L6-v2 on movie sentences, with AdaLoRA."""
    options: dict[str, Any] = {**locals(), "from": from_}  # the parameters that are flags have their names in FLAGS
    given = {name: options[name] for name in setting.FLAGS if options[name] not in (None, [])}
    is_bare = recipe is None and not set_ and {*given} <= {"out", "precision"}
    mapping = reading.mapping_at(recipe) if recipe is not None else {}
    if resume and is_bare:  # the run's own recipe, but for its `out`: the folder may have been moved
        from tunerkit_cli.running.output import recipe_file

        mapping = reading.mapping_at(recipe_file(Path(given.setdefault("out", "out")).expanduser()))
    source = str(recipe or "the recipe")
    merged = _merged(mapping, given, set_ or [])
    chosen = reading.structure(merged, source)
    from tunerkit_cli.running import checking  # imports no torch; what is imported after its first check does

    checking.check(chosen, resume=resume, overwrite=overwrite)
    if chosen.from_adapter is not None:
        from tunerkit_cli.running.starting import completed

        chosen = reading.structure(completed(merged, chosen, resume=resume), source)
    chosen = checking.completed(chosen, resume=resume)
    try:
        from tunerkit_cli.running.run import run

        run(chosen, Console(), resume=resume, overwrite=overwrite, dry_run=dry_run)
    except KeyboardInterrupt:
        from tunerkit_cli.running.output import after_interrupt

        print(f"tunerkit: interrupted{after_interrupt(Path(chosen.out).expanduser())}", file=sys.stderr)
        raise typer.Exit(130) from None


def _merged(mapping: dict[str, Any], given: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """A recipe's mapping with the values of flags and of ``--set``, which replace its own."""
    for name in ("lr", "epochs"):
        if name in given and not 0 < given[name] < float("inf"):
            raise TunerkitError(f"--{name}: expected a number above 0, got {given[name]}")
    mapping = setting.merge(mapping, given)
    if settings:
        mapping = setting.from_command_line(mapping, settings)
    # The demo shows what the head alone reaches.
    is_demo = mapping.get("data") is None and mapping.get("task") in (None, "text-classification")
    return {"baseline": is_demo, **mapping}
