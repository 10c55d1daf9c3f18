"""The record of a run: plain values from which the report is drawn, and from which the folder is loaded again."""

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs
import torch

import tunerkit
from tunerkit import hooks, injection
from tunerkit.plugin import RankChange, Tuner
from tunerkit_cli.preparing.session import Session
from tunerkit_cli.recipes.recipe import Recipe, files_of, to_mapping
from tunerkit_cli.report.record import Problem
from tunerkit_cli.report.scores import is_better_high
from tunerkit_cli.tasks.language import are_conversations
from tunerkit_cli.watching.callback import read_restarts
from tunerkit_transformers.output_folder import VERSION
from tunerkit_transformers.pretrained import Pretrained
from tunerkit_transformers.run_folder import stated

_PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "scikit-learn", "sentence-transformers")


@attrs.frozen(eq=False)
class Trained:
    """What a training leaves: the trainer's logs, the ranks at its start, how long its parts took, and its results.

    ``right`` is that of `Results`, of the held-out rows as they were encoded.
    """

    logs: Sequence[Mapping[str, Any]]
    start: RankChange
    seconds: Mapping[str, float]
    metrics: Mapping[str, float]
    confusion: Sequence[Sequence[int]] | None
    problems: Sequence[Problem] = ()
    right: Sequence[bool] | None = None


def record_of(session: Session, trained: Trained, kept: Recipe, samples: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The record of a run. ``kept`` is the recipe with full paths."""
    task, data, loaded = session.task, session.data, session.loaded
    record: dict[str, Any] = {
        "version": VERSION,
        "task": task.name,
        "model": model_facts(loaded, session.trainer.args.seed, session.folder.path),
        "data": {"train": sources_of(session, data.source), "eval": sources_of(session, data.held_out_source)},
        "rows": {part: session.rows(part) for part in data.parts},
        "held_out": {
            name: {**found, "source": sources_of(session, found["source"])} if name == "also_trained_example" else found
            for name, found in data.findings.items()
        },
        "columns": list(data.train[0]),
        "labels": list(data.labels),
        "metrics": dict(trained.metrics),
        "main_metric": task.main_metric_of(data.labels),
        "greater_is_better": is_better_high(task.main_metric),
        "logs": [dict(entry) for entry in trained.logs],
        "seconds": dict(trained.seconds),
        "device": str(loaded.model.device),
        "precision": session.precision,
        "max_length": task.limit,
        **_adapter_facts(session.tuner, trained),
        "recipe": to_mapping(kept),
        "environment": _environment(session.tuner.method),
    }
    if session.start is not None:  # as in the copy of the adapter, from which a resumed run starts
        record["config"] = tunerkit.unstructure(session.tuner.config.settled())
    further = {
        "conversations": are_conversations(task, data.train),
        "bad_rows": len(data.left_out) or None,
        "left_out": {part: dict(fit.left_out) for part, fit in session.fits.items() if fit.missing},
        "restarts": [attrs.asdict(restart) for restart in read_restarts(session.folder)],
        "problems": [attrs.asdict(problem) for problem in trained.problems],
        "confusion": trained.confusion,
        "samples": [*samples],
        "metric_rows": len(session.measure.rows) or None,
        "savings": [attrs.asdict(saving) for saving in session.savings],
        "memory": None if session.plan is None else {**attrs.asdict(session.plan), "total": session.plan.total},
    }
    record = finite({**record, **{name: value for name, value in further.items() if value not in (None, {}, [])}})
    return record


def _adapter_facts(tuner: Tuner, trained: Trained) -> dict[str, Any]:
    """What a run's record says of its adapter: method, config, parameters, budget, ranks, sizes and spectrum."""
    ranks, counts = tuner.ranks(), tunerkit.trainable_parameters(tuner.model)
    slots = [slot for _, slot in injection.slots_in(tuner)]
    own = {path: sum(p.numel() for p in adapter.parameters()) for path, adapter in tuner.adapters().items()}
    facts: dict[str, Any] = {
        "method": tuner.method,
        "steps": tuner.steps,
        "parameters": {
            "trained": counts.trainable,
            "all": counts.total,
            "adapters": sum(own.values()),
            "copies": sum(p.numel() for slot in slots if slot.copy is not None for p in slot.copy.parameters()),
            "biases": sum(slot.bias.numel() for slot in slots if slot.bias is not None),
        },
        "sizes": own,
        "stacks": stacks_of(tuner),
        "config": tunerkit.unstructure(tuner.config),
    }
    if ranks:
        end = RankChange(step=tuner.steps, budget=tuner.budget(), ranks=ranks)
        history = [trained.start, *tuner.history, end]
        unit = str(facts["config"].get("budget_unit", "rank"))
        facts |= {
            "ranks": ranks,
            "history": [
                {"step": each.step, "budget": each.budget, "ranks": [*each.ranks.values()]} for each in history
            ],
            "budget": {"start": trained.start.budget, "end": end.budget, "live": sum(ranks.values()), "unit": unit},
        }
        if injection.needs_steps(tuner):
            facts["caps"] = dict(trained.start.ranks)
            masks = {path: getattr(tuner.adapters()[path], "mask", None) for path in facts["stacks"]}
            facts["experts"] = {path: mask.sum(-1).tolist() for path, mask in masks.items() if mask is not None}
    if spectrum := _spectrum(tuner):
        facts["spectrum"] = spectrum
    return facts


def stacks_of(tuner: Tuner) -> dict[str, int]:
    """The number of matrices of each target that is a stack of them, such as experts."""
    slots = {target.path: injection.slots_of(target.module) for target in tuner.targets}
    return {path: own.base.stack for path, own in slots.items() if own and own.base and own.base.stack}


def _environment(method: str) -> dict[str, str]:
    """The versions that a run depends on."""
    owner = tunerkit.methods()[method]
    found = {"python": platform.python_version(), "platform": platform.platform(), "tunerkit": tunerkit.__version__}
    for name in (*_PACKAGES, owner.distribution):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def model_facts(loaded: Pretrained, seed: int, run: Path) -> dict[str, Any]:
    """What the base model was, so that it can be loaded again: a folder is named by its path, see `stated`."""
    folder = Path(loaded.source).expanduser()
    return {
        "name": folder.name if folder.is_dir() else loaded.source,
        "source": stated(str(folder.resolve()), run) if folder.is_dir() else loaded.source,
        "revision": loaded.revision,
        "class": type(loaded.model).__name__,
        "seed": seed,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "quantisation": loaded.quantisation,
    }


def sources_of(session: Session, text: str) -> str:
    """A text about the files of data, with their paths as the recipe states them."""
    given = [str(Path(each)) for each in (*files_of(session.recipe.data), *files_of(session.recipe.eval_data))]
    for path in sorted(given, key=len, reverse=True):
        text = text.replace(path, stated(path, session.folder.path))
    return text


def without_home(text: str) -> str:
    """A text in JSON with ``~/`` for the path of the home folder."""
    home = json.dumps(os.path.expanduser("~") + os.sep, ensure_ascii=False)[1:-1]
    return re.sub(rf"(?<![\w.-]){re.escape(home)}", "~/", text)


def finite(value: Any) -> Any:
    """The value without what is NaN or infinite in it, as a gradient's norm may be: JSON has neither."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items() if not _is_nonfinite(inner)}
    if isinstance(value, list | tuple):
        return [None if _is_nonfinite(inner) else finite(inner) for inner in value]
    return value


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@torch.no_grad()
def _spectrum(tuner: Tuner) -> dict[str, list[float]]:
    """The singular values of what each adapter adds, in a stack the root mean squares; nothing without factors."""
    method, adapters = tuner.method, tuner.adapters()
    if not hooks.has_factors(method):
        return {}
    products = {
        path: hooks.factors(path, method, adapters[path], slots.base)
        for path, _, slots in injection.walk(tuner.model)
        if path in adapters and slots.base is not None and slots.base.has_weight
    }
    values = {path: torch.atleast_2d(each.triplets()[1]).square().mean(0).sqrt() for path, each in products.items()}
    return {path: [round(value, 8) for value in each.tolist()] for path, each in values.items()}
