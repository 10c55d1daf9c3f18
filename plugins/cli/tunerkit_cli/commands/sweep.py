"""``tunerkit sweep``."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tunerkit import TunerkitError
from tunerkit.errors import shown
from tunerkit_cli.recipes import reading, setting
from tunerkit_cli.recipes.recipe import PATHS, default_method, with_full_paths
from tunerkit_cli.sweeping.grid import Plan, arms_of, axes_of


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
    begun = None if resume else _planned(recipe, given, lr, set_ or [], methods, sizes, seeds or 3)
    from tunerkit_cli.sweeping.sweep import read_plan, sweep  # imports torch, which most mistakes spare

    try:
        plan = read_plan(out, seeds) if begun is None else begun
        sweep(plan, out, Console(), resume=resume, hours=hours, allow_code=allow_code)
    except KeyboardInterrupt:
        code = " --allow-code" if allow_code else ""
        do = f"tunerkit sweep --out {shlex.quote(str(out))} --resume{code}"
        print(f"tunerkit: interrupted; go on with: {do}", file=sys.stderr)
        raise typer.Exit(130) from None


def _planned(
    recipe: Path | None,
    given: Mapping[str, object],
    lr: str | None,
    settings: Sequence[str],
    methods: str | None,
    sizes: str | None,
    seeds: int,
) -> Plan:
    """The plan of a new sweep; ``given`` has the flags that `tunerkit train` has too."""
    axes, fixed = axes_of(lr, settings)
    mapping = setting.merge(reading.mapping_at(recipe) if recipe is not None else {}, given)
    mapping = setting.from_command_line(mapping, fixed) if fixed else mapping
    mapping = with_full_paths({key: value for key, value in mapping.items() if key != "out"})
    axes |= {key: [str(each) for each in with_full_paths({key: axes[key]})[key]] for key in PATHS if key in axes}
    if mapping.get("from_adapter") is not None:
        from tunerkit_cli.preparing.starting import completed

        mapping = completed(mapping, reading.structure(mapping), resume=False)
    compared, ranks = _listed(methods), [_size(each) for each in _listed(sizes)]
    if ranks and not compared:
        compared = [mapping.get("method") or default_method(has_data=mapping.get("data") is not None)]
    if not compared:
        arms_of(mapping, axes)  # refuses what is wrong with them
    has_rate = any("learning_rate" in each for each in (*axes, *fixed))
    return Plan(mapping, axes, seeds, compared, ranks, searches_rates=bool(compared) and not has_rate)


def _listed(text: str | None) -> list[str]:
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def _size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise TunerkitError(f"--sizes: expected ranks of LoRA between commas, such as 2,8, got {shown(text)}")
    return int(text)
