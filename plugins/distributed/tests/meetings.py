"""Where processes meet under DistributedDataParallel, and where they do not. Each process imports this by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from plugins.distributed.tests import skipping
from tests.support import together
from tests.support.collectives import Collectives
from tunerkit import steps

METHOD, CONFIG = "toy-low-rank", {"targets": "all-linear"}
_BYTES = 28  # of a meeting


class _Loop:
    """A wrapped model in DDP, and the optimizer of all that it trains."""

    def __init__(self, net: nn.Module) -> None:
        self.model: nn.Module = tunerkit.wrap(net, METHOD, CONFIG, seed=1)
        self.parallel = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        tunerkit.attach(self.model, self.optimizer)

    def backward(self, number: int) -> None:
        x, classes = together.rows(number)
        nn.functional.cross_entropy(self.parallel(x), classes).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in tunerkit.tuner(self.model).parameters()]


def _meetings(found: Collectives) -> int:
    return found.sizes["allreduce_", _BYTES]


def ddp_skips(rank: int, folder: Path) -> str:
    """One process skips a backward."""
    loop = _Loop(together.net())
    return skipping.skips_backward(rank, loop.parallel, loop.step)


def ddp_has_one_more(rank: int, folder: Path) -> str:
    """One process has one backward more."""
    loop = _Loop(together.net())
    return skipping.has_one_more(rank, loop.parallel, loop.step)


def ddp_accumulates(rank: int, folder: Path) -> Any:
    """Each step has a backward that DDP does not average, and one that it does; then one process has one more.

    Raises in the last step; before, it stores the number of meetings of the first.
    """
    loop = _Loop(together.net())

    def step(unaveraged: int) -> None:
        with loop.parallel.no_sync():
            for _ in range(unaveraged):
                loop.backward(0)
        loop.backward(1)
        loop.step()

    with Collectives() as found:
        step(1)
    try:
        with skipping.limited():
            step(1 + rank)
    except tunerkit.errors.StepError as error:
        return _meetings(found), str(error)


def ddp_joins(rank: int, folder: Path) -> list[Tensor]:
    """Process 1 has one batch more, which DDP's ``join`` allows: the weights."""
    loop = _Loop(together.net())
    with skipping.limited(), loop.parallel.join():
        for number in range(2 + rank):
            loop.backward(number)
            loop.step()
    return loop.weights()


def ddp_steps_idly(rank: int, folder: Path) -> int:
    """Both processes step without a backward: the steps."""
    loop = _Loop(together.net())
    with skipping.limited():
        loop.step()
        loop.step()
    return tunerkit.tuner(loop.model).steps


def ddp_one_looks(rank: int, folder: Path) -> int:
    """Process 0 alone evaluates, and takes gradients of its own; then both train, and it goes on alone.

    The steps, of which both processes take two.
    """
    loop = _Loop(together.net())
    with skipping.limited():
        for number in range(2):
            if rank == 0:
                with torch.no_grad():
                    loop.parallel.module(together.inputs())
                torch.autograd.grad(loop.model(together.inputs()).sum(), [*tunerkit.tuner(loop.model).parameters()])
            loop.backward(number)
            loop.step()
        steps.detach(tunerkit.tuner(loop.model))
        if rank == 0:
            loop.model(together.inputs()).sum().backward()
    return tunerkit.tuner(loop.model).steps


def ddp_alternates(rank: int, folder: Path) -> Any:
    """Two models train against one another, each with its optimizer; then one process skips a backward of the first.

    The meetings in two rounds, and the error.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge, maker = _Loop(together.net()), _Loop(nn.Sequential(nn.Linear(12, 12)))

    def play(*, judged: bool = True) -> None:
        x, classes = together.rows(0)
        if judged:
            with torch.no_grad():
                made = maker.parallel(x)
            nn.functional.cross_entropy(judge.parallel(made), classes).backward()
        judge.step()
        (-nn.functional.cross_entropy(judge.parallel(maker.parallel(x)), classes)).backward()
        maker.step()
        judge.optimizer.zero_grad()

    with skipping.limited(), Collectives() as found:
        play()
        play()
    try:
        with skipping.limited():
            play(judged=rank == 0)
    except tunerkit.errors.StepError as error:
        return _meetings(found), str(error)


def ddp_two_adapters(rank: int, folder: Path) -> int:
    """Two adapters of one model have an optimizer each: the meetings of one backward and two steps."""
    model: nn.Module = together.net()
    for name in ("first", "second"):
        model = tunerkit.wrap(model, METHOD, CONFIG, adapter=name, seed=1)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizers = []
    for name in ("first", "second"):
        optimizers.append(torch.optim.SGD([*tunerkit.tuner(model, name).parameters()], lr=0.1))
        tunerkit.attach(model, optimizers[-1], adapter=name)
    with skipping.limited(), Collectives() as found:
        parallel(together.inputs()).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return _meetings(found)


def ddp_local(rank: int, folder: Path) -> list[Tensor]:
    """Process 0 alone takes a backward of the model inside, which DDP does not see; then both train: the weights."""
    loop = _Loop(together.net())
    with skipping.limited():
        for number in range(2):
            if rank == 0:
                loop.model(together.inputs()).sum().backward()
                loop.optimizer.zero_grad()
            loop.backward(number)
            loop.step()
    return loop.weights()


def ddp_twins(rank: int, folder: Path) -> None:
    """Two models with adapters of one name are trained in another order. Raises."""
    loops = [_Loop(together.net()), _Loop(together.net())]
    with skipping.limited():
        for number, loop in enumerate(loops if rank == 0 else loops[::-1]):
            loop.backward(number)
            loop.step()


def ddp_with_buffers_runs_out(rank: int, folder: Path) -> None:
    """Process 1 has one batch less, and saves, while DDP in process 0 waits in a forward, for buffers. Raises."""
    net = together.net()
    net.register_buffer("positions", torch.ones(2))
    loop = _Loop(net)
    with skipping.limited():
        for number in range(3 - rank):
            loop.backward(number)
            loop.step()
        tunerkit.save(loop.model, folder)


def ddp_is_gone(rank: int, folder: Path) -> None:
    """The DDP is dropped, and training goes on without it. Raises."""
    loop = _Loop(together.net())
    loop.backward(0)
    loop.step()
    loop.parallel = loop.model  # type: ignore[assignment]  # no DDP any more
    loop.backward(1)
    loop.step()


def ddp_with_a_later_adapter(rank: int, folder: Path) -> list[Tensor]:
    """A second adapter is wrapped after the first was attached, and batches use one of them: the weights."""
    model: nn.Module = tunerkit.wrap(together.net(), METHOD, {"targets": ["0"]}, adapter="first", seed=1)
    optimizers = [torch.optim.SGD([*tunerkit.tuner(model).parameters()], lr=0.1)]
    tunerkit.attach(model, optimizers[0])
    model = tunerkit.wrap(model, METHOD, {"targets": ["2"]}, adapter="second", seed=1)
    tunerkit.activate(model, ["first", "second"])
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizers.append(torch.optim.SGD([*tunerkit.tuner(model, "second").parameters()], lr=0.1))
    tunerkit.attach(model, optimizers[1], adapter="second")
    with skipping.limited():
        for number in range(4):
            tunerkit.activate(model, ["first" if (number + rank) % 2 else "second"])
            parallel(together.inputs()).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for name in ("first", "second") for p in tunerkit.tuner(model, name).parameters()]


def fsdp2_skips(rank: int, folder: Path) -> str:
    """One process skips a backward, where FSDP2 gathers the base in it, and the adapters are whole."""
    return _under_fsdp2(rank, skipping.skips_backward)


def fsdp2_has_one_more(rank: int, folder: Path) -> str:
    """One process has one backward more there."""
    return _under_fsdp2(rank, skipping.has_one_more)


def _under_fsdp2(rank: int, way: Callable[..., str]) -> str:
    model, _, optimizer = together.built(together.Job("fsdp2", METHOD, {"targets": ["0", "2"]}), None)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return way(rank, model, step)


CASES = (
    *(ddp_skips, ddp_has_one_more, ddp_accumulates, ddp_joins, ddp_steps_idly, ddp_one_looks, ddp_alternates),
    *(ddp_two_adapters, ddp_local, ddp_twins, ddp_is_gone, ddp_with_a_later_adapter, fsdp2_skips, fsdp2_has_one_more),
    ddp_with_buffers_runs_out,  # last: after it, the processes wait for different things in the group of the meetings
)
