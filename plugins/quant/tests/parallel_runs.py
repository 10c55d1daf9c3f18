"""Trainings on quantised bases in two processes, which import this by name, and the same in one."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import fsdp

import tunerkit
from plugins.quant.tests import quantised
from tests.support import two_processes

STEPS, ROWS, ACCUMULATED = 8, 16, 2
ENGINES = ("plain", "ddp", "fsdp2", "fsdp2 sharded")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "adalora": {"init_rank": 8, "target_rank": 2, "t_init": 2, "t_final": 2, "delta_t": 1},
}


def train(engine: str, method: str, rank: int = 0, processes: int = 1, **settings: Any) -> dict[str, Any]:
    """Train on nf4, with accumulation and clipping: the model, the one that runs, and what they are compared by."""
    config = {**METHODS[method], "targets": list(quantised.TARGETS), **settings}
    model: Any = tunerkit.wrap(quantised.nf4(), method, config, seed=1)
    running: nn.Module = nn.parallel.DistributedDataParallel(model) if engine == "ddp" else model
    if engine.startswith("fsdp2"):
        ignored = set(tunerkit.tuner(model).parameters()) if engine == "fsdp2" else set()
        for layer in (model[0], model[2], model):
            fsdp.fully_shard(layer, ignored_params=ignored)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, classes = torch.randn(ROWS, quantised.IN, generator=generator), torch.arange(ROWS) % 4
        optimizer.zero_grad()
        for part in range(ACCUMULATED):
            own = slice(part * processes + rank, None, processes * ACCUMULATED)
            (nn.functional.cross_entropy(running(x[own]), classes[own]) / ACCUMULATED).backward()
        nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
    tuner = tunerkit.tuner(model)
    with tuner.whole():
        weights = {name: parameter.detach().clone() for name, parameter in tuner.named_parameters()}
    history = [(change.step, change.budget, change.ranks) for change in tuner.history]
    with torch.no_grad():
        output = running(quantised.X)
    return {"model": model, "ranks": tuner.ranks(), "history": history, "weights": weights, "output": output}


def be_one(rank: int, folder: str) -> None:
    """Be one of two processes: all engines and methods. The results are in ``{folder}/{rank}.pt``."""
    warnings.simplefilter("ignore")
    with two_processes.joined(rank, folder):
        found = {}
        for engine in ENGINES:
            for method in METHODS:
                # Where shapes stay, one process keeps them too: clipping counts the gradients of masked triplets.
                kept = method == "adalora" and engine == "fsdp2 sharded"
                each = train(engine, method, rank, 2, **({"shrink": False} if kept else {}))
                model = each.pop("model")
                each["file"] = tunerkit.save(model, Path(folder) / f"{engine} {method}")
                each["merge"], each["dense"] = _merged(model), _dense(model, merged=not engine.startswith("fsdp2"))
                found[engine, method] = each
        torch.save(found, f"{folder}/{rank}.pt")


def _dense(model: nn.Module, *, merged: bool) -> Any:
    """The output after the quantised layers became dense ones; or the error's text."""
    with torch.no_grad():
        try:
            return tunerkit.unwrap(model, keep_merged=merged, dtype=torch.float32)(quantised.X)
        except tunerkit.TunerkitError as error:
            return str(error)


def _merged(model: nn.Module) -> Any:
    """The outputs of the merged and of the unmerged model; or the error's text."""
    with torch.no_grad():
        try:
            return tunerkit.merge(model)(quantised.X), tunerkit.unmerge(model)(quantised.X)
        except tunerkit.TunerkitError as error:
            return str(error)
