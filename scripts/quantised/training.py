"""The training loop of a cell, with or without a stop."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS, RANK, TARGETS = 8, 4, ("q_proj", "v_proj", "down_proj")
# AdaLoRA prunes for the last time between the two: after step 6 in tunerkit, after step 7 in peft.
STOPS = (3, 7)


@attrs.frozen
class Package:
    """What a user of one package writes around a training loop.

    Attributes:
        parameters: What the optimizer gets.
        start: What is done with the model and the optimizer before the first step.
        after: What is done with the model after a step, which is counted from 0.
        save: Writes the adapter into a folder.
        load: Puts it onto a fresh base, to train on.
    """

    parameters: Callable[[Any], list[nn.Parameter]]
    start: Callable[[Any, Optimizer], object]
    after: Callable[[Any, int], object]
    save: Callable[[Any, Path], object]
    load: Callable[[Path], Any]


def batch() -> Tensor:
    """Two sequences of 24 tokens."""
    return torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    """The output in eval mode."""
    with torch.no_grad():
        found: Tensor = model.eval()(batch()).logits
    return found.float()


def trained(package: Package, model: Any, folder: Path) -> bool:
    """Train ``model``, each step after a forward in eval mode; whether each trainable tensor had a gradient.

    At each of `STOPS`, what resumes from there is written below ``folder``.
    """
    optimizer = torch.optim.AdamW(package.parameters(model), lr=5e-3)
    package.start(model, optimizer)
    complete = True
    for step in range(STEPS):
        if step in STOPS:
            package.save(model, folder / str(step))
            torch.save(optimizer.state_dict(), folder / str(step) / "optimizer.pt")
        _step(package, model, optimizer, step)
        if step == 2:
            # A pruned module has gradients of 0, which is no fault.
            found = [p.grad for p in package.parameters(model) if p.numel()]
            complete = all(grad is not None for grad in found) and any(bool(g.any()) for g in found if g is not None)
    return complete


def resumed(package: Package, folder: Path, stop: int) -> Any:
    """The model at the end of the training that was stopped at ``stop``, on a base that is quantised afresh."""
    model = package.load(folder / str(stop))
    optimizer = torch.optim.AdamW(package.parameters(model), lr=5e-3)
    package.start(model, optimizer)
    optimizer.load_state_dict(torch.load(folder / str(stop) / "optimizer.pt"))
    for step in range(stop, STEPS):
        _step(package, model, optimizer, step)
    return model


def how_it_resumes(compared: Callable[[Any], str], package: Package, folder: Path) -> str:
    """What ``compared`` says of the model at the end, for each stop; an error's name if one is raised."""
    found = [_tried(compared, package, folder, stop) for stop in STOPS]
    if len(set(found)) == 1:
        return found[0]
    return "; ".join(f"from step {stop}: {cell}" for stop, cell in zip(STOPS, found, strict=True))


def share(found: Tensor, wanted: Tensor, base: Tensor) -> str:
    """The difference as a share of what the adapter changes."""
    return f"{float((found - wanted).norm() / (wanted - base).norm()):.1e}"


def equal_or_share(found: Tensor, wanted: Tensor, base: Tensor) -> str:
    """Yes if every bit is the same."""
    return "yes" if torch.equal(found, wanted) else f"differs by {share(found, wanted, base)}"


def name_of(error: Exception) -> str:
    """The cell of what a library raised. The message goes to the standard error stream."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return type(error).__name__


def _step(package: Package, model: Any, optimizer: Optimizer, step: int) -> None:
    logits(model)
    optimizer.zero_grad()
    ids = batch()
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    package.after(model, step)


def _tried(compared: Callable[[Any], str], package: Package, folder: Path, stop: int) -> str:
    try:
        return compared(resumed(package, folder, stop))
    except Exception as error:  # whatever a library raises is the cell
        return name_of(error)
