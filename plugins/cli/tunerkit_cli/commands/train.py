"""``tunerkit train``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tunerkit import TunerkitError
from tunerkit_cli.recipes import reading, setting
from tunerkit_cli.recipes.recipe import TASKS
from tunerkit_cli.running import processes

_Recipe = Annotated[
    Path | None, typer.Argument(help="A recipe, as `tunerkit init` writes it. Options replace its values.")
]
_Task = Annotated[str | None, typer.Option(help=f"One of {', '.join(TASKS)}. Default: what the data asks for.")]
_Method = Annotated[
    str | None,
    typer.Option(
        help="The method. `tunerkit methods` lists the installed ones. Default: lora, and adalora without --data."
    ),
]
_From = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Go on training an adapter: an output folder, a file of tunerkit's, or a PEFT folder. Its method and "
        "settings stay. Default: train a new one.",
    ),
]
_Model = Annotated[str | None, typer.Option(help="A local folder or a hub name. Default: all-MiniLM-L6-v2.")]
_Data = Annotated[
    list[str] | None,
    typer.Option(
        help="A .csv, .tsv, .json, .jsonl or .parquet file, or a folder of images; may be given several times. "
        "Default: movie sentences."
    ),
]
_EvalData = Annotated[
    list[str] | None,
    typer.Option(help="The held-out data; may be given several times. Default: a fifth of --data."),
]
_TextColumn = Annotated[str | None, typer.Option(help="The name of the text column. Default: text.")]
_LabelColumn = Annotated[str | None, typer.Option(help="The name of the label column. Default: label.")]
_Config = Annotated[str | None, typer.Option(help="The method's settings, as YAML or JSON: a file, or written out.")]
_Out = Annotated[str | None, typer.Option(help="The output folder. Default: out.")]
_Epochs = Annotated[float | None, typer.Option(help="Default: 3; for language models 1.")]
_Lr = Annotated[float | None, typer.Option(help="The peak learning rate. Default: as the task needs.")]
_BatchSize = Annotated[int | None, typer.Option(min=1, help="Default: 32; for language models 8.")]
_MaxLength = Annotated[int | None, typer.Option(min=4, help="Longer texts are truncated to this many tokens.")]
_Precision = Annotated[
    str | None,
    typer.Option(
        help="What matrix products are computed in: fp32, bf16 or fp16. Default: fp32 on a CPU, bf16 on an "
        "accelerator that has it."
    ),
]
_Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Default: 0.")]
_Baseline = Annotated[
    bool | None, typer.Option(help="Also train the head alone, for comparison. Default: only without --data.")
]
_Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any key of a recipe, as in --set training.warmup_steps=10.")
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Show data, lengths, steps and parameters, and stop.")]


def train(
    recipe: _Recipe = None,
    task: _Task = None,
    method: _Method = None,
    from_: _From = None,
    model: _Model = None,
    data: _Data = None,
    eval_data: _EvalData = None,
    text_column: _TextColumn = None,
    label_column: _LabelColumn = None,
    config: _Config = None,
    out: _Out = None,
    epochs: _Epochs = None,
    lr: _Lr = None,
    batch_size: _BatchSize = None,
    max_length: _MaxLength = None,
    precision: _Precision = None,
    seed: _Seed = None,
    baseline: _Baseline = None,
    set_: _Settings = None,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    dry_run: _DryRun = False,
) -> None:
    """Train an adapter, by default with LoRA. Without options: all-MiniLM-L6-v2 on movie sentences, with AdaLoRA."""
    options: dict[str, Any] = {**locals(), "from": from_}  # the parameters that are flags have their names in FLAGS
    given = {name: options[name] for name in setting.FLAGS if options[name] not in (None, [])}
    is_bare = recipe is None and {*given} <= {"out", "precision"}
    mapping = reading.mapping_at(recipe) if recipe is not None else {}
    if resume and is_bare:  # the run's own recipe, but for its `out`: the folder may have been moved
        from tunerkit_cli.running.folder import RunFolder

        mapping = reading.mapping_at(RunFolder(Path(given.setdefault("out", "out")).expanduser()).recipe_file)
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

        run(chosen, Console(quiet=not processes.is_first()), resume=resume, overwrite=overwrite, dry_run=dry_run)
    except KeyboardInterrupt:
        from tunerkit_cli.running.folder import RunFolder

        said = RunFolder(Path(chosen.out).expanduser()).after_interrupt()
        if processes.is_first():
            print(f"tunerkit: interrupted{said}", file=sys.stderr)
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
