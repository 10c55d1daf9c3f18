"""Trainings of adapters on experts in several processes, each of which imports this by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import fsdp

import tunerkit
from plugins.distributed.tests import zero_training
from plugins.distributed.tests.zero_training import ZeroJob
from plugins.experts.tests.tiny_mixtral import IDS, adam, logits, wrapped
from tests.support import two_processes
from tunerkit.errors import AdapterError

STEPS = 8
METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 3}, "miss": {"rank": 4}, "hra": {"rank": 4}}
ADALORA = {"target_rank": 2, "init_rank": 4, "delta_t": 2, "shrink": False}
# Under ZeRO-3: method and targets.
ZERO: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora", ("experts",)),
    ("lora", ("q_proj", "experts")),
    ("adalora", ("q_proj", "experts")),
)
ENGINES = ("ddp", "fsdp2 blocks", "fsdp2 experts")


def parallel(model: Any, engine: str) -> nn.Module:
    """The module that is called: DDP around the model, or the model itself after ``fully_shard``."""
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if engine != "alone":
        for layer in model.model.layers:
            if engine == "fsdp2 experts":  # a group of their own, which is gathered for them alone
                fsdp.fully_shard(layer.mlp.experts)
            fsdp.fully_shard(layer)
        fsdp.fully_shard(model)
    return model  # type: ignore[no-any-return]


def train(
    engine: str, method: str, folder: Path, rank: int = 0, of: int = 1, targets: Sequence[str] = ("experts",)
) -> dict[str, Any]:
    """Train on this process's share of the sequences, and look at what came of it.

    Returns:
        The adapter's weights, the outputs as trained, merged and unmerged, and the file.
    """
    model = wrapped(method, targets=list(targets), **{**METHODS, "adalora": ADALORA}[method])
    runs = parallel(model, engine)
    optimizer = adam(model)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        runs(IDS[rank::of], labels=IDS[rank::of]).loss.backward()
        optimizer.step()
    file = tunerkit.save(model, folder / f"{engine} {method}")
    with tunerkit.tuner(model).whole():
        weights = {name: each.detach().clone() for name, each in tunerkit.tuner(model).named_parameters()}
    ranks = tunerkit.tuner(model).ranks()
    found = {"weights": weights, "file": file, "trained": logits(runs), "ranks": ranks}
    tunerkit.merge(model)
    found["merged"] = logits(runs)
    tunerkit.unmerge(model)
    return {**found, "unmerged": logits(runs)}


def train_all(rank: int, folder: str) -> None:
    """Be one of two processes that train by each engine; the results are written to ``{folder}/{rank}.pt``."""
    with two_processes.joined(rank, folder):
        found = {
            (engine, method): train(engine, method, Path(folder), rank, 2) for engine in ENGINES for method in METHODS
        }
        torch.save(found, f"{folder}/{rank}.pt")


def train_under_zero_3(rank: int, folder: str) -> None:
    """Be one of two processes that train under ZeRO-3; the results are written to ``{folder}/{rank}.pt``."""
    with two_processes.joined(rank, folder):
        deepspeed = zero_training.prepare(rank)
        found = {job: _train_under_zero_3(deepspeed, *job, rank, Path(folder)) for job in ZERO}
        torch.save(found, f"{folder}/{rank}.pt")


def _train_under_zero_3(deepspeed: Any, method: str, targets: Sequence[str], rank: int, folder: Path) -> dict[str, Any]:
    model = wrapped(method, targets=list(targets), **{**METHODS, "adalora": ADALORA}[method])
    config = zero_training.settings(ZeroJob(3, method, {}, options={"gradient_accumulation_steps": 1}))
    config |= {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=config)
    tunerkit.attach(model, engine, total_steps=STEPS)
    refused = ""
    if targets == ("experts",):
        try:
            engine(IDS[rank::2], labels=IDS[rank::2])
        except AdapterError as error:
            refused = str(error)
        model.enable_input_require_grads()
    for _ in range(STEPS):
        engine.backward(engine(IDS[rank::2], labels=IDS[rank::2]).loss)
        engine.step()
    empty = all(not parameter.numel() for parameter in tunerkit.tuner(model).parameters())
    file = tunerkit.save(model, folder / "-".join([method, *targets]))
    # While they are empty.
    ranks, shown = tunerkit.tuner(model).ranks(), [*map(str, tunerkit.tuner(model).adapters().values())]
    with tunerkit.tuner(model).whole():
        weights = {name: each.detach().clone() for name, each in tunerkit.tuner(model).named_parameters()}
    found = {"weights": weights, "file": file, "empty": empty, "trained": logits(engine), "refused": refused}
    return {**found, "ranks": ranks, "shown": shown}
