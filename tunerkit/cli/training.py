"""A plain training loop for classifiers."""

import random
from collections.abc import Callable, Iterator

import attrs
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import tunerkit
from tunerkit import TunerkitError
from tunerkit.cli.batches import Rows, shuffled_batches, sorted_batches
from tunerkit.cli.recipe import Recipe
from tunerkit.libraries import torch_private

IGNORED = -100  # the label that the loss ignores, the same as in torch and transformers


@attrs.frozen
class Step:
    """The number of one optimizer step (from 1), and the loss before it."""

    number: int
    loss: float


class DivergedError(TunerkitError):
    """The loss is not finite, so the weights are useless."""


@attrs.frozen
class Score:
    """Accuracy and mean loss on held-out rows."""

    accuracy: float
    loss: float


def attach_adapters(model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
    """Attach the adapters in ``model``, if it has any."""
    if tunerkit.trainable_parameters(model).adapters:
        tunerkit.attach(model, optimizer, total_steps=total_steps)


def adamw(model: nn.Module, recipe: Recipe) -> Optimizer:
    """AdamW over all trainable parameters, with one learning rate."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def train(
    model: nn.Module,
    rows: Rows,
    recipe: Recipe,
    *,
    device: torch.device,
    dropout: bool = True,
    mixed: bool = True,
    make_optimizer: Callable[[nn.Module, Recipe], Optimizer] = adamw,
    prepare: Callable[[nn.Module, Optimizer, int], None] = attach_adapters,
) -> Iterator[Step]:
    """Train all trainable parameters, and yield after each step.

    ``prepare`` is called before the first step with the model, the optimizer and the number of steps.
    ``recipe.seed`` determines data order and dropout. Without ``dropout`` the model stays in eval mode. Without
    ``mixed`` precision the result does not depend on whether the device supports bf16.
    """
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    lengths = rows.lengths
    total = recipe.total_steps(len(lengths))
    optimizer = make_optimizer(model, recipe)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scheduler = LambdaLR(optimizer, lambda step: recipe.rate_at(step, total))
    prepare(model, optimizer, total)
    model.train(dropout)
    batches = (batch for _ in range(recipe.epochs) for batch in shuffled_batches(lengths, recipe.batch_size, rng))
    for number, batch in enumerate(batches, start=1):
        with mixed_precision(device, enabled=mixed):
            loss = model(**rows.batch(batch, device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield Step(number, loss.item())


@torch.inference_mode()
def evaluate(model: nn.Module, rows: Rows, *, batch_size: int, device: torch.device, mixed: bool = True) -> Score:
    """Return accuracy and mean loss over all labels that are not `IGNORED`. The model is left in eval mode.

    See `train` for ``mixed``.
    """
    model.eval()
    right, labels, loss = 0, 0, 0.0
    for batch in sorted_batches(rows.lengths, batch_size):
        inputs = rows.batch(batch, device)
        with mixed_precision(device, enabled=mixed):
            out = model(**inputs)
        right += int((out.logits.argmax(-1) == inputs["labels"]).sum())
        known = int((inputs["labels"] != IGNORED).sum())
        loss += out.loss.item() * known
        labels += known
    return Score(accuracy=right / labels, loss=loss / labels)


def choose_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def mixed_precision(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    """Autocast to bf16 if ``enabled`` and fast on ``device``; emulated bf16 would be slow."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and has_bf16(device))


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices faster in bf16 than in fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # With AVX-512's bf16 the casts cost more than is saved: a step of the demo took 1.4 times as long as in fp32.
    return device.type == "cpu" and torch_private.multiplies_bf16_in_tiles()
