"""``tunerkit train``. Its flags are read from `FLAGS`, and described as the recipe's keys that they set."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import attrs
import typer
from rich.console import Console

from tunerkit import TunerkitError
from tunerkit_cli.machine import processes
from tunerkit_cli.recipes import reading, setting
from tunerkit_cli.recipes.recipe import Recipe

# The flags that set no key of a recipe itself, or in another form: their types, and what typer says of them.
_OTHERS: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "data": (list[str], {}),
    "eval_data": (list[str], {"help": "The held-out data; may be given several times. Default: a fifth of --data."}),
    "config": (str, {"help": "The method's settings, as YAML or JSON: a file, or written out."}),
    "epochs": (float, {"help": "Default: 3; for language models 1."}),
    "lr": (float, {"help": "The peak learning rate. Default: as the task needs."}),
    "batch_size": (int, {"min": 1, "help": "Default: 32; for language models 8."}),
    "seed": (int, {"min": 0, "max": 2**32 - 1, "help": "Default: 0."}),
    "text_column": (str, {"help": "The name of the text column. Default: text."}),
    "label_column": (str, {"help": "The name of the label column. Default: label."}),
}


def _flags() -> Iterator[inspect.Parameter]:
    """The parameters of all flags, as typer reads them, with the default None."""
    keys = attrs.fields_dict(Recipe)
    for name, key in setting.FLAGS.items():
        kind, said = _OTHERS.get(name, (None, {}))
        if key in keys:
            metadata = keys[key].metadata
            allowed = f" One of {', '.join(metadata['enum'])}." if "enum" in metadata else ""
            allowed += " May be given several times. Default: movie sentences." if key == "data" else ""
            said = {"help": metadata["doc"] + allowed, "min": metadata.get("ge"), **said}
            kind = kind or keys[key].type
        dashed = f"--{name.replace('_', '-')}"
        option = typer.Option(None, f"{dashed}/--no-{name}" if kind is bool else dashed, **said)
        yield inspect.Parameter(f"{name}_", inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, as `tunerkit init` writes it. Options replace its values.")
    ] = None,
    *,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any key of a recipe, as in --set training.warmup_steps=10.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show data, lengths, steps and parameters, and stop.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the Python files that the recipe's `metric` and `reward` name.")
    ] = False,
    **flags: Any,
) -> None:
    """Train an adapter, by default with LoRA. Without options: all-MiniLM-L6-v2 on movie sentences, with AdaLoRA."""
    from tunerkit_cli.folder import RunFolder
    from tunerkit_cli.preparing import checking  # imports no torch; what is imported after its first check does

    given = {name.removesuffix("_"): value for name, value in flags.items() if value not in (None, [])}
    is_bare = recipe is None and {*given} <= {"out", "precision"}
    mapping = reading.mapping_at(recipe) if recipe is not None else {}
    if resume and is_bare:  # the run's own recipe, but for its `out`: the folder may have been moved
        mapping = reading.mapping_at(RunFolder(Path(given.setdefault("out", "out")).expanduser()).recipe_file())
    source = str(recipe or "the recipe")
    merged = _merged(mapping, given, set_ or [])
    chosen = reading.structure(merged, source)
    checking.check(chosen, resume=resume, overwrite=overwrite, allow_code=allow_code)
    if chosen.from_adapter is not None:
        from tunerkit_cli.preparing.starting import completed

        chosen = reading.structure(completed(merged, chosen, resume=resume), source)
    chosen = checking.completed(chosen, resume=resume)
    try:
        from tunerkit_cli.running.run import run

        run(chosen, Console(quiet=not processes.is_first()), resume=resume, overwrite=overwrite, dry_run=dry_run)
    except KeyboardInterrupt:
        said = RunFolder(Path(chosen.out).expanduser()).after_interrupt()
        if processes.is_first():
            print(f"tunerkit: interrupted{said}", file=sys.stderr)
        raise typer.Exit(130) from None


# Typer reads a parameter for each flag in place of ``flags``.
_OWN = [*inspect.signature(train).parameters.values()]
train.__signature__ = inspect.Signature([_OWN[0], *_flags(), *_OWN[1:-1]])  # type: ignore[attr-defined]


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
