"""The ranks of an adapter under a Trainer: a summary for its logs, and a file with the rank of every target."""

import json
import os
from collections.abc import MutableMapping
from pathlib import Path

from tunerkit import hooks, serialization
from tunerkit.injection import Tuner

# An environment variable, as the Trainer's reporters have them: what is logged belongs to neither method nor model.
_EACH_TARGET = "TUNERKIT_LOG_TARGET_RANKS"
_OFF = ("", "0", "false")


def rows_of(tuner: Tuner, logged: MutableMapping[str, int], *, prefix: str) -> dict[str, float]:
    """Return what a row of the logs says of an adapter with a budget: the budget, and mean, least and greatest rank.

    With ``TUNERKIT_LOG_TARGET_RANKS=1`` in the environment, the first row after an allocation also has the rank of each
    target, which for a large model are hundreds of entries.

    Args:
        tuner: The adapter's handle.
        logged: How many allocations have been logged, by adapter name; it is updated.
        prefix: What each key starts with.
    """
    budget = hooks.budget(tuner, None)
    if budget is None:
        return {}
    ranks = tuner.ranks()
    row: dict[str, float] = {f"{prefix}budget": budget}
    if ranks:
        row[f"{prefix}rank_mean"] = sum(ranks.values()) / len(ranks)
        row[f"{prefix}rank_min"], row[f"{prefix}rank_max"] = min(ranks.values()), max(ranks.values())
    if os.environ.get(_EACH_TARGET, "").lower() not in _OFF and logged.get(tuner.name) != len(tuner.history):
        logged[tuner.name] = len(tuner.history)
        row |= {f"{prefix}rank/{path}": rank for path, rank in ranks.items()}
    return row


def write_ranks(tuner: Tuner, folder: Path) -> None:
    """Write ``ranks.json`` beside the adapter's file, if the adapter has a budget. Nothing reads it back."""
    budget = hooks.budget(tuner, None)
    if budget is not None:
        found = {"step": tuner.steps, "budget": budget, "ranks": tuner.ranks()}
        serialization.replace(folder / "ranks.json", [f"{json.dumps(found, indent=1)}\n".encode()])
