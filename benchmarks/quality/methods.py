"""The compared methods, ours and PEFT's, all with the same targets, head and scale."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import attrs
import peft
from torch import nn
from torch.optim import AdamW, Optimizer

import tunerkit
from benchmarks.quality import variants
from benchmarks.quality.tasks import TASKS, Task
from benchmarks.quality.training import Recipe
from tunerkit_adalora import AdaLoraConfig

if TYPE_CHECKING:
    from benchmarks.quality.runs import Run

HEAD_ONLY, FULL = "head", "full"
LORA, ADALORA, PEFT_LORA, PEFT_ADALORA = "lora", "adalora", "peft-lora", "peft-adalora"
METHODS = (HEAD_ONLY, FULL, PEFT_LORA, LORA, PEFT_ADALORA, ADALORA)
# The compared methods, by the names in tables and plots.
NAMES = {LORA: "LoRA", ADALORA: "AdaLoRA", PEFT_ADALORA: "PEFT's AdaLoRA"}
SCALE = 2.0  # alpha over rank, everywhere
# New heads are trained at this rate under every method. At an adapter's far lower rate, most of a training would go
# into the head, and more rank would only start faster.
HEAD_RATE = 1e-2
EXPERIMENT = "experiment"  # the key in AdaLoRA's settings for the arguments of `variants`


def attach_adapters(model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
    """Attach the adapters in ``model``, if there are any."""
    if tunerkit.trainable_parameters(model).adapters:
        tunerkit.attach(model, optimizer, total_steps=total_steps)


@attrs.frozen(eq=False)
class Prepared:
    """A model ready to train. ``connect`` is called with the model, its optimizer and the number of steps.

    ``scored`` is the model to evaluate, by default the same one. ``running`` is a context that surrounds the training.
    """

    model: nn.Module
    connect: Callable[[nn.Module, Optimizer, int], None] = attach_adapters
    scored: nn.Module = attrs.field(default=attrs.Factory(lambda self: self.model, takes_self=True))
    running: AbstractContextManager[None] = attrs.field(factory=nullcontext)

    def count(self) -> int:
        """The number of trained parameters, the head's included. PEFT's AdaLoRA keeps its masked parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def settings_and_ranks(self) -> dict[str, Any]:
        """The resolved settings of our methods, and AdaLoRA's rank at each target."""
        if not tunerkit.trainable_parameters(self.model).adapters:
            return {"config": {}, "ranks": {}}
        tuner = tunerkit.tuner(self.model)
        adaptive = isinstance(tuner.config, AdaLoraConfig)
        return {"config": tunerkit.unstructure(tuner.config.settled()), "ranks": tuner.ranks() if adaptive else {}}


def adamw_with_heads(task: Task, model: nn.Module, recipe: Recipe) -> Optimizer:
    """AdamW in which the task's heads have the rate `HEAD_RATE`, however the method renames them."""
    heads: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (heads if any(f".{head}." in f".{name}" for head in task.heads) else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": others}, {"params": heads}]
    if others:
        groups[1]["lr"] = HEAD_RATE
    return AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(0.9, recipe.beta2),
        weight_decay=0.0,
    )


def prepare(run: "Run", model: nn.Module, total_steps: int) -> Prepared:
    """Put the run's method into ``model``."""
    task = TASKS[run.task]
    if run.method == FULL:
        return Prepared(model)
    if run.method == HEAD_ONLY:
        model.requires_grad_(False)
        for head in task.heads:
            model.get_submodule(head).requires_grad_(True)
        return Prepared(model)
    if run.method == LORA:
        return Prepared(tunerkit.wrap(model, "lora", {**_shared(run), "rank": run.rank, **run.settings}, seed=run.seed))
    if run.method == ADALORA:
        return _adalora(run, model)
    return _peft(run, model, total_steps)


def _shared(run: "Run") -> dict[str, Any]:
    task = TASKS[run.task]
    return {"targets": f"re:{task.targets}", "train_modules": list(task.heads)}


def _adalora(run: "Run", model: nn.Module) -> Prepared:
    """AdaLoRA that ends at the cost of LoRA's rank everywhere, plus one λ per triplet, which an export folds into P."""
    settings = {**_shared(run), "target_rank": run.rank, "budget_unit": "parameters", **run.settings}
    experiment: Mapping[str, Any] = settings.pop(EXPERIMENT, {})
    resolved = AdaLoraConfig(**settings).resolved()
    if not resolved.exact_svd:  # the default when the rows were made; the grids collapse and default have today's
        settings.setdefault("alpha", SCALE * resolved.init_rank)
    wrapped = tunerkit.wrap(model, "adalora", settings, seed=run.seed)
    starts = {name: value for name, value in experiment.items() if name.startswith("q_")}
    changes = {name: value for name, value in experiment.items() if name != "lambda_rate" and name not in starts}
    variants.restart_(wrapped, **starts)

    def connect(model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        variants.scale_lambda_steps(model, optimizer, experiment["lambda_rate"])
        attach_adapters(model, optimizer, total_steps)

    return Prepared(
        wrapped,
        connect if "lambda_rate" in experiment else attach_adapters,
        running=variants.changed(**changes) if changes else nullcontext(),
    )


def _peft(run: "Run", model: nn.Module, total_steps: int) -> Prepared:
    task = TASKS[run.task]
    shared: dict[str, Any] = {"target_modules": task.targets, "modules_to_save": list(task.heads) or None}
    if run.method == PEFT_LORA:
        config = peft.LoraConfig(**{**shared, "r": run.rank, "lora_alpha": SCALE * run.rank, **run.settings})
        return Prepared(peft.get_peft_model(model, config))
    first = run.settings.get("init_r", math.ceil(1.5 * run.rank))
    sizes = {"init_r": first, "target_r": run.rank, "lora_alpha": SCALE * first}
    spans = {"tinit": total_steps // 10, "tfinal": 3 * total_steps // 10, "deltaT": 10, "total_step": total_steps}
    config = peft.AdaLoraConfig(**{**shared, **sizes, **spans, **run.settings})
    wrapped = peft.get_peft_model(model, config)
    # PEFT adds its regulariser to the loss in the model below `PeftModel`; `PeftModel` without a task type bypasses it.
    # So the inner model is trained, and the outer one is scored, without the regulariser.
    return Prepared(wrapped.base_model, _update_and_allocate, scored=wrapped)


def _update_and_allocate(model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
    """Call PEFT's allocator after each step, before gradients are reset."""
    inner: Any = model
    steps = 0

    def after(*_: object) -> None:
        nonlocal steps
        steps += 1
        inner.update_and_allocate(steps)

    optimizer.register_step_post_hook(after)
