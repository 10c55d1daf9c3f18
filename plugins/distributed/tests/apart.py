"""What goes wrong when the processes of a training do not do the same. Each process imports this by name."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict

import tunerkit
from plugins.distributed.tests import meetings
from tests.support import together, two_processes
from tunerkit_testing.toy_methods import LowRankPlugin

METHOD, CONFIG = "toy-low-rank", {"targets": ["0", "2"]}


def go_wrong(rank: int, folder: str) -> None:
    """Be one of two processes that go wrong in several ways; for each, the error or the result of this process.

    The answers are written to ``{folder}/{rank}.pt``, and how long all took under ``"seconds"``.
    """
    with two_processes.joined(rank, folder):
        tunerkit.register(LowRankPlugin())
        os.environ["TUNERKIT_LOOK_SECONDS"] = "0.5"  # so that waiting for one another ends soon
        started, answers = time.monotonic(), {}
        for case in (
            *(another_seed, other_settings, no_seed, skipped_backward, extra_backward, late_skip, unused, alone),
            *(trains_base, other_rate, frozen_by_one, trained_later, first_deleted, evaluated_outside, lbfgs),
            finished_between,
            *(failed_save, saved_by_one, asked_by_one),
            *meetings.CASES,
        ):
            answers[case.__name__] = _answer(partial(case, rank, Path(folder) / case.__name__))
        answers["seconds"] = time.monotonic() - started
        torch.save(answers, f"{folder}/{rank}.pt")


def _answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except tunerkit.TunerkitError as error:
        return f"{type(error).__name__}: {error}"


def _attached(seed: int | None = 1, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    settings = {**CONFIG, **options.pop("settings", {})}
    model: nn.Module = tunerkit.wrap(together.net(), METHOD, settings, seed=seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer, **options)
    return model, optimizer


def _loss(model: nn.Module, rank: int) -> torch.Tensor:
    x, classes = together.rows(rank)
    return nn.functional.cross_entropy(model(x), classes)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in tunerkit.tuner(model).parameters()]


def another_seed(rank: int, folder: Path) -> Any:
    """The processes wrap with seeds of their own."""
    _attached(seed=rank)


def other_settings(rank: int, folder: Path) -> Any:
    """The processes adapt other layers."""
    _attached(settings={"targets": [["0"], ["0", "2"]][rank]})


def no_seed(rank: int, folder: Path) -> Any:
    """No seed is given, and the random states differ: the start is that of process 0."""
    torch.manual_seed(rank)
    model, _ = _attached(seed=None)
    return _weights(model)


def skipped_backward(rank: int, folder: Path) -> Any:
    """One process has no backward in its second step."""
    model, optimizer = _attached()
    for step in range(4):
        optimizer.zero_grad()
        loss = _loss(model, rank)
        if (rank, step) != (1, 1):
            loss.backward()
        optimizer.step()


def trains_base(rank: int, folder: Path) -> Any:
    """The optimizer trains a layer of the base too."""
    model: nn.Module = tunerkit.wrap(together.net(), METHOD, CONFIG, seed=1)
    model.get_submodule("4").requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer)
    _loss(model, rank).backward()
    optimizer.step()


def other_rate(rank: int, folder: Path) -> Any:
    """The optimizers have learning rates of their own."""
    model: nn.Module = tunerkit.wrap(together.net(), METHOD, CONFIG, seed=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    tunerkit.attach(model, torch.optim.SGD(trained, lr=0.1 * (1 + rank)))


def frozen_by_one(rank: int, folder: Path) -> Any:
    """One process freezes a parameter, the other trains it: whether it has a gradient after backward."""
    model, _ = _attached()
    first = next(tunerkit.tuner(model).parameters())
    if rank == 1:
        first.requires_grad_(False)
    _loss(model, rank).backward()
    return first.grad is not None


def trained_later(rank: int, folder: Path) -> Any:
    """The optimizer gets a layer of the base after the first step."""
    model, optimizer = _attached()
    for step in range(3):
        if step == 1:
            layer = model.get_submodule("4").requires_grad_(True)
            optimizer.add_param_group({"params": list(layer.parameters())})
        optimizer.zero_grad()
        _loss(model, rank).backward()
        optimizer.step()


def first_deleted(rank: int, folder: Path) -> Any:
    """The adapter that was attached first is deleted; the other one goes on, and its averages are put off."""
    model, _ = _attached()
    tunerkit.delete(model, "default")
    for name in ("first", "second"):
        tunerkit.wrap(model, METHOD, CONFIG, adapter=name, seed=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer)
    tunerkit.delete(model, "first")
    for _ in range(3):
        optimizer.zero_grad()
        with tunerkit.no_sync(model):
            _loss(model, rank).backward()
        optimizer.step()
    return _weights(model)


def evaluated_outside(rank: int, folder: Path) -> Any:
    """DDP trains, and the model runs outside of it before the backward: the squares of the gradients."""
    model: nn.Module = tunerkit.wrap(together.net(), METHOD, CONFIG, seed=1)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    tunerkit.attach(model, optimizer)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = _loss(parallel, rank)
        with torch.no_grad(), tunerkit.disabled(model):
            model(together.inputs())
        loss.backward()
        found.append(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        optimizer.step()
    return found


def finished_between(rank: int, folder: Path) -> Any:
    """Process 0 saves before a step that all take, and then all save to the same place: is the file new?"""
    model, optimizer = _attached()
    for step in range(2):
        optimizer.zero_grad()
        _loss(model, rank).backward()
        optimizer.step()
        if step == 0 and rank == 0:
            tunerkit.save(model, folder)
    file = tunerkit.save(model, folder)
    here = model(together.inputs()).detach()
    return bool(torch.equal(tunerkit.load(together.net(), file)(together.inputs()).detach(), here))


def lbfgs(rank: int, folder: Path) -> Any:
    """The optimizer decides by the loss."""
    model: nn.Module = tunerkit.wrap(together.net(), METHOD, CONFIG, seed=1)
    tunerkit.attach(model, torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad]))


def extra_backward(rank: int, folder: Path) -> Any:
    """One process accumulates over one batch more."""
    model, optimizer = _attached()
    for step in range(4):
        optimizer.zero_grad()
        for _ in range(2 + (rank == 1 and step == 1)):
            _loss(model, rank).backward()
        optimizer.step()


def late_skip(rank: int, folder: Path) -> Any:
    """One process does not step once."""
    model, optimizer = _attached()
    for step in range(4):
        optimizer.zero_grad()
        _loss(model, rank).backward()
        if (rank, step) != (0, 2):
            optimizer.step()


def unused(rank: int, folder: Path) -> Any:
    """One process uses only a part of the model, and none uses one parameter: the gradients after backward."""
    model, _ = _attached(settings={"targets": ["0", "2", "4"]})
    part = model.get_submodule("0" if rank == 0 else "2")
    part(torch.ones(1, 12 if rank == 0 else 16)).sum().backward()
    found = [parameter.grad for parameter in tunerkit.tuner(model).parameters()]
    return [None if grad is None else grad.clone() for grad in found]


def alone(rank: int, folder: Path) -> Any:
    """Each process trains an adapter of its own, and saves it."""
    model, optimizer = _attached(seed=rank, data_parallel=False)
    for _ in range(1 + rank):
        optimizer.zero_grad()
        _loss(model, rank).backward()
        optimizer.step()
    return _weights(model), tunerkit.save(model, folder / str(rank)).exists()


def failed_save(rank: int, folder: Path) -> Any:
    """Process 0 cannot write."""
    model, optimizer = _attached()
    _loss(model, rank).backward()
    optimizer.step()
    if rank == 0:
        folder.write_text("a file where a folder is needed")
    tunerkit.save(model, folder)


def saved_by_one(rank: int, folder: Path) -> Any:
    """Process 0 saves alone, and then both do: whether the file is there when the call returns."""
    model, optimizer = _attached()
    _loss(model, rank).backward()
    optimizer.step()
    if rank == 0:
        tunerkit.save(model, folder / "alone")
        time.sleep(0.5)
    return tunerkit.save(model, folder / "both").exists()


def asked_by_one(rank: int, folder: Path) -> Any:
    """Process 0 asks for the state of an optimizer that has none, which steps it. Then both train."""
    model, optimizer = _attached()
    if rank == 0:
        state_dict.get_optimizer_state_dict(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(model, rank).backward()
        optimizer.step()
    return tunerkit.tuner(model).steps, _weights(model)


def end_apart(rank: int, folder: str, lost: bool) -> None:
    """Be one of two processes of which one ends its training a step earlier, and saves, or is lost.

    The error of each is written to ``{folder}/{rank}.txt``.
    """

    def train() -> None:
        model, optimizer = _attached()
        for _ in range(3 - rank):
            optimizer.zero_grad()
            _loss(model, rank).backward()
            optimizer.step()
        if lost and rank == 1:
            os._exit(0)
        tunerkit.save(model, Path(folder) / "saved")

    with two_processes.joined(rank, folder):
        tunerkit.register(LowRankPlugin())
        os.environ["TUNERKIT_LOOK_SECONDS"] = "0.5"
        Path(folder, f"{rank}.txt").write_text(str(_answer(train)))
        other, until = Path(folder, f"{1 - rank}.txt"), time.monotonic() + 120
        while not (lost or other.exists() or time.monotonic() > until):
            time.sleep(0.1)  # a process that is gone would be another error
        os._exit(0)  # the processes are apart: leaving the group would wait for ever


STEPS = 8


def be_killed(rank: int, folder: str) -> None:
    """Be one of two processes that save after every second step; process 1 ends without a word in its sixth."""
    with two_processes.joined(rank, folder):
        tunerkit.register(LowRankPlugin())
        _train(rank, Path(folder), killed=6)


def be_restarted(rank: int, folder: str) -> None:
    """Be one of two processes that go on from what `be_killed` left, and then train anew beside it.

    The weights at the end of both are written to ``{folder}/{rank}.pt``.
    """
    with two_processes.joined(rank, folder):
        tunerkit.register(LowRankPlugin())
        ends = [_train(rank, Path(folder)), _train(rank, Path(folder) / "whole")]
        torch.save(ends, f"{folder}/{rank}.pt")


def _train(rank: int, folder: Path, *, killed: int = 0) -> list[torch.Tensor]:
    place = folder / "checkpoint"
    there = (place / "last").exists()
    model: nn.Module = (
        tunerkit.load(together.net(), place, trainable=True)
        if there
        else tunerkit.wrap(together.net(), METHOD, CONFIG, seed=1)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    first = int((place / "last").read_text()) if there else 0
    if there:
        optimizer.load_state_dict(torch.load(place / f"optimizer-{first}.pt", weights_only=False))
    for step in range(first, STEPS):
        x, classes = together.rows(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rank::2]), classes[rank::2])
        if (rank, step + 1) == (1, killed):
            os._exit(9)
        loss.backward()
        optimizer.step()
        if step % 2:
            _checkpoint(model, optimizer, place, step + 1, rank)
    return _weights(model)


def _checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, place: Path, step: int, rank: int) -> None:
    if rank == 0:
        place.mkdir(parents=True, exist_ok=True)
        torch.save(optimizer.state_dict(), place / f"optimizer-{step}.pt")
    tunerkit.save(model, place)
    if rank == 0:
        (place / "last").write_text(str(step))
