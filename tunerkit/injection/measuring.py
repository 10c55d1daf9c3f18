"""Runs a wrapped model on batches, and measures the inputs and gradients at an adapter's targets."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.injection.slots import slots_of
from tunerkit.injection.tuner import Tuner
from tunerkit.layers import Sketch
from tunerkit.paths import few
from tunerkit.records import Statistics, StatisticsRequest

Loss = Callable[[Any, Any], Tensor]


def measure(
    tuner: Tuner, request: StatisticsRequest, batches: Iterable[Any], loss: Loss | None
) -> tuple[dict[str, Statistics], int]:
    """Measure what a method wants to know of the data, at each of its targets.

    Args:
        tuner: The adapter's handle. Its model should be in eval mode.
        request: What to measure.
        batches: The batches; each is one call of the model.
        loss: See `loss_of`.

    Returns:
        The statistics by target path, and the number of batches.

    Raises:
        AdapterError: There is no batch, one gives no loss, a target never ran, its input cannot be seen, or the
            statistics are not finite.
    """
    sketches = _sketches(tuner, request)
    ran: set[str] = set()
    handles = [
        target.module.register_forward_hook(_noting(ran, target.path, sketches[target.path]), with_kwargs=True)
        for target in tuner.targets
    ]
    try:
        count = _run_all(tuner.model, batches, loss, list(sketches.values()))
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise AdapterError("there is no batch to calibrate on: batches is empty, or an iterator that is used up")
    if idle := [path for path in sketches if path not in ran]:
        raise AdapterError(
            f"{len(idle)} targets never ran on these batches: {few(idle, shown=5)}; give batches that use them, or "
            "exclude them from the targets"
        )
    if wrong := [path for path, sketch in sketches.items() if not sketch.is_finite()]:
        raise AdapterError(
            f"the statistics at {few(wrong, shown=5)} contain NaN or inf, so the model's activations or gradients do; "
            "check the batches, or load the model in float32 or bfloat16"
        )
    return {path: sketch.statistics() for path, sketch in sketches.items()}, count


def _run_all(model: nn.Module, batches: Iterable[Any], loss: Loss | None, sketches: Sequence[Sketch]) -> int:
    """Run the model on every batch, and add the gradients of the probes up. Returns the number of batches."""
    probes = [probe for each in sketches for probe in (each.p, each.q) if probe is not None]
    count = 0
    for batch in batches:
        count += 1
        if probes:
            value = loss_of(model, batch, loss)
            with _uncounted(sketches):
                gradients = torch.autograd.grad(value, probes, allow_unused=True)
            for probe, grad in zip(probes, gradients, strict=True):
                if grad is not None:
                    probe.grad = grad if probe.grad is None else probe.grad + grad
        else:
            with torch.no_grad():
                _run(model, batch)
    return count


@contextmanager
def _uncounted(sketches: Sequence[Sketch]) -> Iterator[None]:
    """Run a backward pass, in which a model that checkpoints activations calls its layers again."""
    for sketch in sketches:
        sketch.counting = False
    try:
        yield
    finally:
        for sketch in sketches:
            sketch.counting = True


def _sketches(tuner: Tuner, request: StatisticsRequest) -> dict[str, Sketch]:
    found: dict[str, Sketch] = {}
    for path, slot in tuner.slots():
        slots = slots_of(tuner.modules()[path])
        if slot.adapter is None or slots is None or slots.base is None:
            continue
        if slots.base.lends or not slots.base.has_weight:
            raise AdapterError(
                f"the inputs of {path!r} cannot be seen: its {type(slots.base.module).__name__} is not called with "
                "them; exclude it from the targets"
            )
        # Each target has random matrices of its own, the same in each run.
        generator = torch.Generator().manual_seed(len(found))
        found[path] = Sketch(slots.base, request, generator)
    return found


def _noting(ran: set[str], path: str, sketch: Sketch) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ran.add(path)
        return sketch.hook(module, args, kwargs, output)

    return hook


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """Run a model on a batch and return the loss: of the output and the batch by ``loss``, or as the model gives it.

    Raises:
        AdapterError: There is no loss, or it is not finite.
    """
    output = _run(model, batch)
    value = loss(output, batch) if loss is not None else getattr(output, "loss", output)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise AdapterError(
            f"the method wants gradients, and the model returned {type(value).__name__} instead of a loss; add labels "
            "to the batches, or pass loss=..., a function of the output and the batch"
        )
    if not bool(value.isfinite()):
        raise AdapterError(f"the loss of a batch is {value.item()}; check the batches")
    return value
