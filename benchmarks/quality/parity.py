"""Check that our LoRA and PEFT's are the same method: their losses from the same start on the same batches."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW

import tunerkit
from benchmarks.quality import methods
from benchmarks.quality.batches import Rows
from benchmarks.quality.runs import Run
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import Recipe, train
from tunerkit_lora.adapter import LoraAdapter


def losses(task: str, *, rank: int, learning_rate: float, steps: int, cache: Path) -> dict[str, list[float]]:
    """The loss at each of the first ``steps`` steps, by method; ours starts from PEFT's factors and head."""
    torch.set_num_threads(1)
    runs = [Run(task, method, rank, learning_rate, seed=0) for method in (methods.PEFT_LORA, methods.LORA)]
    built = [TASKS[task].build(cache, run.seed) for run in runs]
    theirs, ours = (
        methods.prepare(run, model, TASKS[task].steps).model for run, (model, _) in zip(runs, built, strict=True)
    )
    _start_alike(ours, theirs)
    return {
        run.method: list(itertools.islice(_train(model, parts.train, run.recipe), steps))
        for run, model, (_, parts) in zip(runs, (theirs, ours), built, strict=True)
    }


def _train(model: nn.Module, rows: Rows, recipe: Recipe) -> Iterator[float]:
    """Train all parameters that require a gradient, the head included, at one rate."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    return train(model, rows, recipe, optimizer, connect=methods.attach_adapters)


@torch.no_grad()
def _start_alike(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy their factors into ours. The heads are equal already: both were drawn with the same seed."""
    inside = theirs.get_submodule("base_model.model")
    for path, adapter in tunerkit.tuner(ours).adapters().items():
        assert isinstance(adapter, LoraAdapter)
        layer = inside.get_submodule(path)
        adapter.a.copy_(layer.get_parameter("lora_A.default.weight"))
        adapter.b.copy_(layer.get_parameter("lora_B.default.weight"))
