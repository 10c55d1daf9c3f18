"""Where the barrier of sharded adapters runs, and where it does not. Each process imports this by name."""

import copy
import gc
import os
import pickle
import warnings
import weakref
from unittest import mock

import torch
from torch import distributed, nn

import tunerkit
from plugins.distributed.tests import sharded_runs, skipping
from plugins.distributed.tests.sharded_runs import adam, build, shard_
from tests.support import together, two_processes
from tests.support.collectives import Collectives
from tunerkit import steps
from tunerkit_distributed import barrier
from tunerkit_distributed.barrier import Barrier


def look_inside(rank: int, processes: int, folder: str) -> None:
    """Answer what `sharded_runs.look_inside` asks, and what is asked here; one process's answers by name."""
    with two_processes.joined(rank, folder, processes):
        answers = {name: check() for name, check in CHECKS.items()} | sharded_runs.look_inside(folder)
        net, own = nn.Linear(2, 2), Barrier()
        own.open_(["default"], net, 1)
        own.watch_(net, forwards=True)
        distributed.barrier()
        distributed.destroy_process_group()
        net(torch.ones(2)).sum().backward()  # the process goes on alone
        torch.save(answers, f"{folder}/{rank}.pt")


def _apart() -> dict[str, str]:
    """One process skips a backward, or has one more, with a method that acts in no step and one that does."""
    found = {}
    for method in ("lora", "adalora"):
        for way in (skipping.skips_backward, skipping.has_one_more):
            model = tunerkit.wrap(together.net(), method, {"targets": "all-linear"}, seed=1)
            shard_(model)
            optimizer = adam(model)
            tunerkit.attach(model, optimizer, total_steps=sharded_runs.STEPS)

            def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            found[f"{method} {way.__name__}"] = way(distributed.get_rank(), model, step)
    return found


def _runs_no_longer() -> bool:
    """A copy, a pickle, one that is compiled as one graph and one that was left run in one process alone.

    A model that is dropped is freed.
    """
    net, own = nn.Linear(2, 2), Barrier()
    before = len(net._forward_hooks), len(net._forward_pre_hooks)
    (member,) = own.open_(["default"], net, 1).values()
    own.watch_(net, forwards=True)
    met = Collectives()
    with met:
        net(torch.ones(2)).sum().backward()
    if distributed.get_rank() == 0:
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), compiled):
            twin(torch.ones(2)).sum().backward()
    member.remove()
    left = (len(net._forward_hooks), len(net._forward_pre_hooks)) == before
    if distributed.get_rank() == 0:
        net(torch.ones(2)).sum().backward()
    dropped = nn.Linear(2, 2)
    own.open_(["default"], dropped, 1)
    own.watch_(dropped, forwards=True)
    gone = weakref.ref(dropped)
    del dropped
    gc.collect()
    return left and met.calls["allreduce_"] == 2 and gone() is None


def _has_no_network() -> bool:
    """If one rank cannot create the host group, none has it, and each warns."""

    def fail(**_: object) -> object:
        if distributed.get_rank() == 1:
            raise RuntimeError("no route")
        return object()

    with mock.patch.object(distributed, "new_group", fail), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host = barrier._new_host_group()
    return host is None and ["if a process skips a backward" in str(each.message) for each in caught] == [True]


def _ends_before_the_interpreter() -> bool:
    """The model then runs without barriers. A fork leaves the host group alone: it has none of its threads."""
    net, own, met = nn.Linear(2, 2), Barrier(), Collectives()
    own.open_(["default"], net, 1)
    own.watch_(net, forwards=True)
    with mock.patch.object(os, "getpid", return_value=0):
        barrier._close_()
    with met:
        net(torch.ones(2)).sum().backward()
    before = met.calls["allreduce_"]
    barrier._close_()
    barrier._close_()
    with met:
        net(torch.ones(2)).sum().backward()
    return (before, met.calls["allreduce_"]) == (2, 2)


def _is_detached() -> bool:
    """Once no adapter is attached, no barrier runs; before, evaluation has none."""
    model = build("lora")
    shard_(model)
    tunerkit.attach(model, adam(model))
    with Collectives() as found, torch.no_grad():
        model(torch.ones(1, 6).double())
    steps.detach(tunerkit.tuner(model))
    with found:
        model(torch.ones(1, 6).double()).sum().backward()
    return found.calls["allreduce_"] == 0


CHECKS = {
    "ends before the interpreter": _ends_before_the_interpreter,
    "runs no longer": _runs_no_longer,
    "no network": _has_no_network,
    "detached": _is_detached,
    "apart": _apart,
}
