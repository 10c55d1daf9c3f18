"""``tunerkit sweep``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tunerkit import TunerkitError
from tunerkit.errors import shown
from tunerkit_cli.recipes import reading, setting
from tunerkit_cli.recipes.recipe import PATHS, default_method, with_full_paths


def sweep(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, as `tunerkit init` writes it. Options replace its values.")
    ] = None,
    *,
    lr: Annotated[str | None, typer.Option(help="Learning rates, separated by commas: 5e-4,1e-3,2e-3.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of a recipe, with one value or several: --set config.rank=4,8."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, max=100, help="How many seeds each setting is trained with; with --resume, more. Default: 3."
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods to compare, each at its best rate: lora,adalora,dora.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Their sizes, as ranks of LoRA with as many parameters: 2,8.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="The training data, as in `tunerkit train`.")] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option(help="The held-out data: half of it chooses, half of it judges.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base model: a local folder, or a name on the hub.")] = None,
    method: Annotated[str | None, typer.Option(help="The method of all runs.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the runs and their comparison.")] = Path("sweep"),
    hours: Annotated[float | None, typer.Option(help="Begin no run that would end later.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out.")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the Python files that the recipe's `metric` names.")
    ] = False,
) -> None:
    """Train a recipe with several values of its keys and several seeds, and say which values to take."""
    if hours is not None and not 0 < hours < float("inf"):
        raise TunerkitError(f"--hours: expected a number above 0, got {hours}")
    out = out.expanduser()
    given = {"data": data, "eval_data": eval_data, "model": model, "method": method}
    given = {name: value for name, value in given.items() if value}
    if resume:
        if recipe is not None or lr or set_ or methods or sizes or given:
            raise TunerkitError("--resume goes on with the sweep in --out as it began; leave the other options out")
    elif methods and method:
        raise TunerkitError("--methods lists the methods to compare; leave --method out")
    from tunerkit_cli.sweeping import grid

    if not resume:
        axes, fixed = grid.axes_of(lr, set_ or [])
        mapping = setting.merge(reading.mapping_at(recipe) if recipe is not None else {}, given)
        mapping = with_full_paths({key: value for key, value in mapping.items() if key != "out"})
        mapping = with_full_paths(setting.from_command_line(mapping, fixed)) if fixed else mapping
        axes = {
            key: [*map(str, with_full_paths({key: values})[key])] if key in PATHS else values
            for key, values in axes.items()
        }
        if mapping.get("from_adapter") is not None and not methods:
            from tunerkit_cli.preparing.starting import completed

            mapping = completed(mapping, reading.structure(mapping), resume=False)
        compared = [] if methods is None else _listed(methods)
        ranks = [] if sizes is None else [_size(each) for each in _listed(sizes)]
        if ranks and not compared:
            compared = [mapping.get("method") or default_method(has_data=mapping.get("data") is not None)]
        if not compared:
            grid.arms_of(mapping, axes)  # before anything slow is imported
    from tunerkit_cli.sweeping.sweep import Plan, read_plan, sweep

    try:
        if resume:
            plan = read_plan(out, seeds)
            sweep(plan, out, Console(), resume=True, hours=hours, allow_code=allow_code)
        else:
            plan = Plan(mapping, axes, 3 if seeds is None else seeds, compared, ranks)
            any_rate = bool(compared) and not any("learning_rate" in each for each in (*axes, *fixed))
            rest: dict[str, Any] = {"any_rate": any_rate, "allow_code": allow_code}
            sweep(plan, out, Console(), resume=False, hours=hours, **rest)
    except KeyboardInterrupt:
        code = " --allow-code" if allow_code else ""
        do = f"tunerkit sweep --out {shlex.quote(str(out))} --resume{code}"
        print(f"tunerkit: interrupted; go on with: {do}", file=sys.stderr)
        raise typer.Exit(130) from None


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise TunerkitError(f"--sizes: expected ranks of LoRA between commas, such as 2,8, got {shown(text)}")
    return int(text)
