"""Print the results of the commands on adapters, and what an adapter's files say: as lines, or as JSON."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from rich.console import Console

from tunerkit.errors import FileError, cut
from tunerkit.paths import few
from tunerkit_cli.report import wording
from tunerkit_cli.report.record import read
from tunerkit_cli.report.verdict import failure
from tunerkit_cli.settings import write_settings
from tunerkit_cli.telling import say
from tunerkit_transformers.output_folder import read_run
from tunerkit_transformers.run_folder import NAME as RECORD

if TYPE_CHECKING:  # they import torch, and `tunerkit show` does not
    from tunerkit_cli.converting.comparison import Compared
    from tunerkit_cli.converting.conversion import Converted
    from tunerkit_cli.converting.verification import Verified

OWN = "tunerkit"  # the name of our own format
_SHOWN = 10  # targets in a list
_LONGEST = 20_000  # characters that are printed as YAML, which takes a second for a megabyte


def print_converted(found: "Converted", *, as_json: bool) -> None:
    """Print what was written."""
    facts = {
        "format": found.format,
        "written": f"{found.out} ({', '.join(found.files)})" if found.files != (found.out,) else found.out,
        "method": found.method,
        "base": "" if found.format in (OWN, "lora") else found.base,  # our own file does not hold it
        "ranks": ranks_in_words(found.ranks),
        "size": size_in_words(found.size),
    }
    if found.error is not None:
        path, largest = next(iter(found.errors.items()))
        facts["error"] = f"{found.error:.2e} of what it adds (Frobenius norm); the largest is {largest:.2e}, at {path}"
    print_facts(attrs.asdict(found), facts, as_json=as_json)


def print_verified(found: "Verified", *, as_json: bool) -> None:
    """Print the differences."""
    effect = "none: A changes no output" if found.of_effect is None else f"{found.of_effect:.2e} of the effect of A"
    facts = {
        "compared": f"{found.outputs:,} outputs, the largest {found.largest:.4g}",
        "difference": f"{found.difference:.2e} at most",
        "relative": f"{found.relative:.2e} of the largest output, {effect}",
        "verdict": f"{'equal within' if found.is_equal else 'differ by more than'} {found.tolerance:g}",
    }
    print_facts(attrs.asdict(found), facts, as_json=as_json)


def print_compared(found: "Compared", *, as_json: bool) -> None:
    """Print how two adapters differ."""
    facts = {
        "method": " and ".join(dict.fromkeys(found.methods)),
        "settings": "; ".join(f"{name}: {a} and {b}" for name, (a, b) in found.settings.items()),
        "only in A": few(found.only[0], shown=_SHOWN),
        "only in B": few(found.only[1], shown=_SHOWN),
        "ranks": few([f"{path}: {a} and {b}" for path, (a, b) in found.ranks.items()], shown=_SHOWN),
        "products": _differences(found.products),
        "copies": _differences(found.copies),
        "biases": _differences(found.biases),
        "verdict": f"{'equal' if found.is_equal else 'different'}: at most {found.largest:.2e} apart",
    }
    print_facts(attrs.asdict(found), facts, as_json=as_json)


def ranks_in_words(ranks: Mapping[str, int]) -> str:
    """Return the ranks of an adapter in a few words: ``"8 at each of 64 targets"``."""
    least, greatest = min(ranks.values(), default=0), max(ranks.values(), default=0)
    if least == greatest:
        return f"{least} at each of {len(ranks)} targets"
    return f"{least} to {greatest}, {sum(ranks.values())} in all at {len(ranks)} targets"


def size_in_words(size: int) -> str:
    """Return a number of bytes as ``"0.25 MiB"``."""
    return f"{size / 2**20:.2f} MiB"


def _differences(found: Mapping[str, float]) -> str:
    """The largest differences, the worst first."""
    return few([f"{name} {value:.2e}" for name, value in found.items()], shown=_SHOWN)


def print_facts(found: Mapping[str, Any], facts: Mapping[str, str], *, as_json: bool) -> None:
    """Print everything that was found as JSON, or the facts that say something, and the remarks below them."""
    console = Console()
    if as_json:
        say(console, json.dumps(found, indent=2, ensure_ascii=False, default=str))
        return
    for name, value in facts.items():
        if value:
            say(console, f"{name:<11} {value}")
    for remark in found.get("remarks", ()):
        say(console, f"note: {remark}")


# --- tunerkit show ---


def show_adapter(source: str, *, as_json: bool = False) -> None:
    """Print method, base, ranks, size and config; of an output folder also its metrics and its training."""
    is_run = os.path.isfile(os.path.join(source, RECORD))
    if not is_run:  # or has only begun
        from tunerkit_transformers.adapter_files import has_no_record  # imports torch

        is_run = not has_no_record(source)
    if is_run:
        run = read_run(source)
        found = dict(run.record)
        facts = {} if as_json else _facts_of_run(run.folder, run.source, found)
        settings = found.get("config") or {}
    else:
        found = describe_adapter(source)
        facts, settings = _facts(found), found["settings"]
    print_facts(found, {name: cut(fact) for name, fact in facts.items()}, as_json=as_json)
    ranks = found.get("ranks") or {}
    for title, values in (("ranks", ranks if len({*ranks.values()}) > 1 else {}), ("config", settings)):
        if values and not as_json:
            text = json.dumps(values, ensure_ascii=False, default=str)
            say(Console(), f"{title}:\n{text if len(text) > _LONGEST else write_settings(dict(values))}")


def describe_adapter(source: str) -> dict[str, Any]:
    """What an adapter's files say without its base model; what they do not state is empty, 0 or None."""
    from tunerkit import serialization  # imports torch, which the record of a run does not need
    from tunerkit.plugin import Description
    from tunerkit_transformers.adapter_files import description_at, refuse_absent

    format = serialization.format_at(source)
    if format is not None:
        found, own, weights = description_at(format, source), None, {}
        if found is None:
            raise FileError(
                f"{source} is an adapter in format {format.name!r}, which can only be read with its base model: "
                f"tunerkit convert {source} --to tunerkit --base DIR --out NEW, then show NEW"
            )
        files = [*Path(source).iterdir()] if os.path.isdir(source) else [Path(source)]
    else:
        refuse_absent(source)
        file, tensors, own = serialization.read(source, content="adapter")
        stated: Any = own.values.get("ranks")  # which earlier versions did not write
        known = stated if isinstance(stated, Mapping) else {}
        ranks = {path: known[path] for path in own.targets if type(known.get(path)) is int}
        weights = {path: own.base.get(path.replace(".stacks.", ".")) for path in own.targets if ".stacks." in path}
        found = Description(own.method, ranks=ranks, copies=own.copies, settings=own.config)
        files = [Path(file)]
    return {
        "source": source,
        "format": OWN if format is None else format.name,
        **attrs.asdict(found),
        "stacks": {path: weight["shape"][0] for path, weight in weights.items() if weight and weight["shape"]},
        "steps": None if own is None else own.steps,
        "parameters": None if own is None else sum(tensor.numel() for tensor in tensors.values()),
        "size": sum(each.stat().st_size for each in files if each.is_file()),
    }


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    return {
        "format": found["format"],
        "method": found["method"],
        "base": found["base"],
        "class": found["model_class"],
        "labels": str(found["labels"] or ""),
        "ranks": ranks_in_words(found["ranks"]) if found["ranks"] else "",
        "stacks": wording.stacks(found["stacks"]),
        "copies": ", ".join(found["copies"]),
        "parameters": "" if found["parameters"] is None else f"{found['parameters']:,}",
        "size": size_in_words(found["size"]) if found["size"] else "",
        "steps": "" if found["steps"] is None else str(found["steps"]),
    }


def _facts_of_run(folder: Path, source: str, record: Mapping[str, Any]) -> dict[str, str]:
    run, file = read(record), folder / "adapter.safetensors"
    left_out = (f"{count} {part}: {why}" for part, found in run.left_out.items() for why, count in found.items())
    return {
        "problems": failure(run.problems),
        "restarts": "; ".join(map(str, run.restarts)),
        "task": run.task,
        "method": run.method,
        "base": source,
        "quantisation": str(run.model.get("quantisation") or ""),
        "labels": ", ".join(run.labels[:20]),
        "rows": ", ".join(f"{count} {part}" for part, count in run.rows.items()),
        "left out": "; ".join(left_out),
        "metrics": ", ".join(f"{name} {value:.4f}" for name, value in run.metrics.items()),
        "ranks": ranks_in_words(run.ranks) if run.ranks else "",
        "stacks": wording.stacks(run.stacks),
        "parameters": f"{run.parameters.trained or 0:,} of {run.parameters.all or 0:,} trained",
        "file": size_in_words(file.stat().st_size if file.is_file() else 0),
        "steps": str(run.steps),
        "precision": run.precision or "",
        "training": ", ".join(f"{name}={value}" for name, value in dict(run.recipe.get("training") or {}).items()),
    }
