"""DistributedDataParallel: it is built anew where adapters change shape, and where it cannot be, shapes stay."""

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import tunerkit
from plugins.distributed.tests import ddp_runs
from tests.support import together, two_processes
from tests.support.toy_growing import GrowingPlugin
from tunerkit.plugin import Cut, shrink_
from tunerkit_distributed import torch_private
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

LONG = os.environ.get("TUNERKIT_LONG") == "1"
SHORT = ["as it is", "views of buckets", "unused parameters", "static graph"]
WAYS = [*ddp_runs.WAYS] if LONG else SHORT


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, by process."""
    folder = tmp_path_factory.mktemp("ddp")
    two_processes.spawn(ddp_runs.run_all, (str(folder), WAYS))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_averaged_once_whatever_changes_shapes(runs: list[dict[str, Any]], way: str) -> None:
    """They equal the averages of gradients that were computed without DDP, after growing, shrinking and loading.

    So do those of a parameter that keeps its shape, of one that was frozen when DDP was built anew, and of one that had
    no element for a while, also with accumulation in no_sync. The old reducers are still alive, and average nothing.
    Buckets have the size of the values.
    """
    for run in runs:
        assert {name: phase["ranks"] for name, phase in run[way].items()} == ddp_runs.PHASES
        for name, phase in run[way].items():
            assert phase["grads"] < (1e-2 if way == "hook" else 1e-6), name
            assert (phase["grads"] > 1e-6) == (way == "hook"), name  # that one still rounds to half precision
            assert phase["buckets"] == 4 * phase["values"], name


def test_shapes_stay_where_the_processes_decide_apart_or_ddp_is_gone(runs: list[dict[str, Any]]) -> None:
    """With data_parallel=False other processes may keep a shape; without its DDP nothing averages."""
    for run in runs:
        assert "with data_parallel=False each process decides for itself" in run["apart"]
        assert "its DistributedDataParallel is gone" in run["gone"]


def test_loading_other_ranks_into_a_ddp_that_nobody_watched_is_an_error(runs: list[dict[str, Any]]) -> None:
    """It was built after attach: without the error, gradients would silently not be averaged."""
    for run in runs:
        assert run["loaded unseen"].startswith("DistributedDataParallel was built for other adapter ranks than")
        assert "Load adapters before you build it, and attach them after" in run["loaded unseen"]


@pytest.fixture
def _alone() -> Iterator[None]:
    """A process group with this process only, in which the obstacles are the same."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    with registered(LowRankPlugin(), GrowingPlugin()):
        yield
    distributed.destroy_process_group()


class Derived(DistributedDataParallel):
    """Somebody's own."""


def delayed(model: nn.Module, *, all_of_them: bool) -> DistributedDataParallel:
    named = [(f"module.{name}"[7:], p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = named if all_of_them else named[:1]
    return DistributedDataParallel(model, delay_all_reduce_named_params=chosen, param_to_hook_all_reduce=named[-1][1])


def with_builtin_hook(model: nn.Module) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model)
    parallel._register_builtin_comm_hook(distributed.BuiltinCommHookType.ALLREDUCE)  # type: ignore[attr-defined]
    return parallel


def with_own_hook(model: nn.Module) -> DistributedDataParallel:
    def my_hook(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, my_hook)
    return parallel


def mixed(model: nn.Module) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model)
    parallel.mixed_precision = object()  # type: ignore[assignment]  # building such a one needs a GPU
    return parallel


def by_compiled_autograd(model: nn.Module) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model)
    parallel._use_python_reducer = True
    return parallel


def joining(model: nn.Module) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model)
    Join([parallel]).__enter__()
    return parallel


def of_another_release(model: nn.Module) -> DistributedDataParallel:
    parallel = DistributedDataParallel(model)
    del parallel._has_rebuilt_buckets
    return parallel


def twice(model: nn.Module) -> list[DistributedDataParallel]:
    return [DistributedDataParallel(model), DistributedDataParallel(model)]


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a class of its own": (Derived, "Derived is a class of its own"),
    "another group": (
        lambda model: DistributedDataParallel(model, process_group=distributed.new_group([0])),
        "its process group is not the default one",
    ),
    "mixed precision": (mixed, "it has a mixed_precision of its own"),
    "some delayed": (lambda model: delayed(model, all_of_them=False), "parameters with a delayed all-reduce"),
    "all delayed": (lambda model: delayed(model, all_of_them=True), "the all-reduce of all parameters is delayed"),
    "a built-in hook": (with_builtin_hook, "the communication hook BuiltinCommHookType.ALLREDUCE"),
    "a hook": (with_own_hook, "the communication hook with_own_hook.<locals>.my_hook, which may know its buckets"),
    "compiled autograd": (by_compiled_autograd, "compiled autograd averages instead of its reducer"),
    "inside Join": (joining, "it has been in a Join block"),
    "another torch": (of_another_release, "this release of torch has no _has_rebuilt_buckets"),
    "two of them": (twice, "it is inside 2 of them"),
}


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("case", REFUSED)
def test_shapes_stay_where_ddp_cannot_be_rebuilt(case: str) -> None:
    """The reason is named, with what to do, and nothing is changed."""
    build, words = REFUSED[case]
    model: nn.Module = tunerkit.wrap(together.net(), "toy-low-rank", {"targets": ["0", "2"]}, seed=1)
    parallel = build(model)
    optimizer = ddp_runs.attached(model)
    own = list(tunerkit.tuner(model).parameters())
    shapes = [parameter.shape for parameter in own]
    reason = shrink_([Cut(own[0], 0, torch.tensor([0]))], optimizer)
    assert reason is not None
    assert reason.startswith("DistributedDataParallel cannot be rebuilt around this model: ")
    assert words in reason
    assert "leave DistributedDataParallel out" in reason
    assert [parameter.shape for parameter in own] == shapes
    assert parallel


@pytest.mark.usefixtures("_alone")
def test_loading_other_ranks_where_ddp_cannot_be_rebuilt_is_an_error_at_the_next_forward() -> None:
    """A change of shapes by loading cannot be refused, so the next forward is."""
    model, other = ddp_runs.wrapped(), ddp_runs.wrapped()
    optimizer = ddp_runs.attached(other)
    ddp_runs.resize(other, optimizer, "grow")
    parallel = DistributedDataParallel(model)
    ddp_runs.attached(model)
    parallel(together.inputs()).sum().backward()
    with Join([parallel]):
        model.load_state_dict(other.state_dict())
        with pytest.raises(
            tunerkit.errors.StepError, match=r"cannot be rebuilt: it has been in a Join block.*Load adapters"
        ):
            parallel(together.inputs())


@pytest.mark.usefixtures("_alone")
def test_a_watched_ddp_is_copied_and_pickled_as_before() -> None:
    """The look for changed shapes holds no parameter; a copy looks at its own."""
    model = ddp_runs.wrapped()
    parallel = DistributedDataParallel(model)
    optimizer = ddp_runs.attached(model)
    twin = copy.deepcopy(parallel)
    ddp_runs.resize(model, optimizer, "grow")
    for each in (parallel, twin):
        each(together.inputs()).sum().backward()
        assert all(p.grad is not None for p in each.parameters() if p.requires_grad)
    stored = pickle.loads(pickle.dumps(parallel))
    for each in (twin, stored):
        loaded = each.module.load_state_dict(model.state_dict())
        assert loaded == ([], [])
        each(together.inputs()).sum().backward()


@pytest.mark.usefixtures("_alone")
def test_a_ddp_that_waits_to_be_freed_does_not_count() -> None:
    """An object in a cycle is freed some time later, in each process at another one."""
    model = ddp_runs.wrapped()
    old: Any = DistributedDataParallel(model)
    old.cycle = old
    del old
    parallel = DistributedDataParallel(model)
    assert torch_private.ddps_around([model]) == [parallel]


@pytest.mark.usefixtures("_alone")
def test_attach_rebuilds_a_ddp_that_was_built_for_other_shapes() -> None:
    """An adapter of other ranks was loaded between: DDP's hooks would be lost without a word."""
    model, other = ddp_runs.wrapped(), ddp_runs.wrapped()
    ddp_runs.resize(other, ddp_runs.attached(other), "grow")
    parallel = DistributedDataParallel(model)
    before = parallel.reducer
    ddp_runs.attached(model)
    assert parallel.reducer is before
    parallel = DistributedDataParallel(model)
    model.load_state_dict(other.state_dict())
    before = parallel.reducer
    ddp_runs.attached(model)
    assert parallel.reducer is not before
