"""Operations that are undone leave nothing behind, and threads that share files or a model get the results of one."""

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.faults.adapters import FILE, config_of, net, output
from tunerkit_testing import small
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin, ShiftPlugin

METHODS = ["toy-low-rank", "toy-shift", "lora", "adalora"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Any:
    with registered(LowRankPlugin(), ShiftPlugin()):
        if request.param not in tunerkit.methods():
            pytest.skip(f"{request.param} is not installed")
        yield request.param


def saved(method: str, folder: Path) -> Path:
    """A folder with an adapter after a short training."""
    model = tunerkit.wrap(net(), method, config_of(method), seed=0).train()
    optimizer = torch.optim.SGD(small.trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=12)
    small.train(model, optimizer, 12)
    tunerkit.save(model, folder)
    return folder


def counts(model: nn.Module) -> dict[str, int]:
    """What is alive in this process and open, and hooks of the model."""
    gc.collect()
    # The class, not isinstance: proxies of libraries would be loaded by it.
    alive = [type(thing) for thing in gc.get_objects()]
    kinds = {"tensors": torch.Tensor, "modules": nn.Module, "optimizers": torch.optim.Optimizer}
    found = {what: sum(issubclass(one, kind) for one in alive) for what, kind in kinds.items()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    files = len(os.listdir("/proc/self/fd"))
    return {**found, "hooks": hooks, "files": files, "threads": threading.active_count()}


def refused_load(model: nn.Module, method: str, folder: Path) -> None:
    (folder / "damaged").mkdir(exist_ok=True)
    (folder / "damaged" / FILE).write_bytes((folder / FILE).read_bytes()[:-1])
    with pytest.raises(tunerkit.errors.FileError):
        tunerkit.load(model, folder / "damaged")


def save_and_disable(model: nn.Module, method: str, folder: Path) -> None:
    tunerkit.save(tunerkit.load(model, folder), folder)
    with tunerkit.disabled(model):
        output(model)
    tunerkit.unwrap(model)


def attach_and_train(model: nn.Module, method: str, folder: Path) -> None:
    tunerkit.wrap(model, method, config_of(method), seed=0)
    optimizer = torch.optim.SGD(small.trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=12)
    small.train(model, optimizer, 3)
    tunerkit.unwrap(model)


# Each leaves the model without adapters.
CYCLES: dict[str, Callable[[nn.Module, str, Path], object]] = {
    "wrap and unwrap": lambda m, method, f: tunerkit.unwrap(tunerkit.wrap(m, method, config_of(method))),
    "load and delete": lambda m, method, f: tunerkit.delete(tunerkit.load(m, f), "default"),
    "merge and unwrap": lambda m, method, f: tunerkit.unwrap(tunerkit.merge(tunerkit.load(m, f))),
    "save and disable": save_and_disable,
    "attach and train": attach_and_train,
    "a refused load": refused_load,
}


@pytest.mark.filterwarnings("ignore::tunerkit.TunerkitWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")
def test_what_is_undone_leaves_nothing_behind(method: str, tmp_path: Path) -> None:
    """Tensors, modules, optimizers, hooks, open files and threads do not become more in five repetitions."""
    folder, model = saved(method, tmp_path), net()
    seen = []
    for times in (2, 5):  # what is cached once is no leak
        for cycle in [*CYCLES.values()] * times:
            cycle(model, method, folder)
        seen.append(counts(model))
    assert {what: seen[1][what] - before for what, before in seen[0].items() if seen[1][what] > before} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_over_and_over_restores_every_bit(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Base weights and output are those of the start after each of many merges."""
    model = tunerkit.load(net().to(dtype), saved(method, tmp_path))
    weights, start = {name: p.clone() for name, p in net().to(dtype).named_parameters()}, output(model)
    for _ in range(25):
        merged = output(tunerkit.merge(model))
        assert not torch.equal(merged, output(net().to(dtype)))
        tunerkit.unmerge(model)
        assert torch.equal(output(model), start)
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())


@pytest.mark.parametrize("shared", ["the model", "the file that is read", "the file that is written"])
def test_threads_get_the_results_of_one(method: str, shared: str, tmp_path: Path) -> None:
    """Four threads run one model, load one file, or save to one place at the same time."""
    folder = saved(method, tmp_path)
    model = tunerkit.load(net(), folder)
    bases = [net() for _ in range(4)]  # first: what builds them seeds the random state that all threads share
    expected = output(model)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "the model": lambda: output(model),
        "the file that is read": lambda: output(tunerkit.load(bases.pop(), folder)),
        "the file that is written": lambda: (tunerkit.save(model, tmp_path / "new"), output(model))[1],
    }
    found: list[torch.Tensor] = []
    barrier = threading.Barrier(4)

    def run() -> None:
        barrier.wait()
        found.append(calls[shared]())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(each, expected) for each in found] == [True] * 4
    if shared == "the file that is written":
        assert torch.equal(output(tunerkit.load(net(), tmp_path / "new")), expected)
