"""One row of the table for tunerkit."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import tunerkit
from scripts.quantised.forms import quantised
from scripts.quantised.training import (
    RANK,
    STEPS,
    STOPS,
    TARGETS,
    Package,
    equal_or_share,
    how_it_resumes,
    logits,
    share,
    trained,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": RANK, "targets": list(TARGETS)},
    "adalora": {"target_rank": RANK, "init_rank": 2 * RANK, "targets": list(TARGETS)},
}


def of_tunerkit(folder: str, form: str, method: str) -> Iterator[str]:
    """The cells of one row, in the columns' order."""
    package = Package(
        parameters=_parameters,
        start=_attach,
        after=lambda model, step: None,
        save=tunerkit.save,
        load=lambda saved: tunerkit.load(quantised(folder, form), saved, trainable=True),
    )
    base = logits(tunerkit.wrap(quantised(folder, form), method, CONFIGS[method]))
    model = tunerkit.wrap(quantised(folder, form), method, CONFIGS[method], seed=0)
    with tempfile.TemporaryDirectory() as saved:
        yield "yes" if trained(package, model, Path(saved)) else "**no gradient**"
        ranks, output = tunerkit.tuner(model).ranks(), logits(model)
        total = RANK * len(ranks)
        yield "exact" if sum(ranks.values()) == total else f"**{sum(ranks.values())} of {total}**"
        loaded = tunerkit.load(quantised(folder, form), tunerkit.save(model, Path(saved) / "end"))
        yield "yes" if torch.equal(logits(loaded), output) else "**no**"

        def compared(again: Any) -> str:
            same = tunerkit.tuner(again).ranks() == ranks
            return equal_or_share(logits(again), output, base) + ("" if same else " (**other ranks**)")

        stopped = [_ranks_in(Path(saved) / str(stop)) for stop in STOPS]
        # The first stop has to be before the pruning, and the second after it.
        assert method == "lora" or stopped == [2 * total, total], stopped
        yield how_it_resumes(compared, package, Path(saved))
    yield from _merged(model, output, base)


def _merged(model: Any, output: torch.Tensor, base: torch.Tensor) -> Iterator[str]:
    try:
        tunerkit.merge(model)
        every = tunerkit.rounding(model).values()
        added, alone = (sum(getattr(each, name) for each in every) / len(every) for name in ("added", "own"))
        yield f"{share(logits(model), output, base)} (weights: {added:.1%}, own {alone:.1%})"
        yield "yes" if torch.equal(logits(tunerkit.unmerge(model)), output) else "**no**"
    except tunerkit.errors.AdapterError:
        yield from ("refused", "–")
    yield share(logits(tunerkit.unwrap(model, keep_merged=True, dtype=torch.float32)), output, base)


def _parameters(model: Any) -> list[nn.Parameter]:
    return [p for p in tunerkit.tuner(model).parameters() if p.requires_grad]


def _attach(model: Any, optimizer: Optimizer) -> None:
    tunerkit.attach(model, optimizer, total_steps=STEPS)


def _ranks_in(folder: Path) -> int:
    """The rows of the tensors Q that an adapter's file holds: pruned triplets that were removed are not in it."""
    from safetensors import safe_open

    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        names = [name for name in file.keys() if name.endswith(".q")]  # noqa: SIM118  # it is no dict
        return sum(file.get_slice(name).get_shape()[0] for name in names)
