"""Canaries: each private name of torch that the engines use exists and behaves as expected."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms import join

from scripts.structure import private_attributes, read
from tests.support.canaries import confirm
from tunerkit_distributed import torch_private

FOLDER = Path(__file__).parents[1] / "tunerkit_distributed"


def ddp_alone(build: Callable[[], bool]) -> Callable[[], bool]:
    """A check in a process group of this process."""

    def check() -> bool:
        met = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=met, rank=0, world_size=1)
        try:
            return build()
        finally:
            torch.distributed.destroy_process_group()

    return check


@ddp_alone
def rebuilt() -> bool:
    """A rebuilt DDP has a new reducer, of the right size, which averages what it is told to, and keeps its hook."""
    module = nn.Linear(2, 2)
    parallel = nn.parallel.DistributedDataParallel(module, static_graph=True)
    parallel.register_comm_hook(None, torch_private._stateless()[0])
    parallel(torch.ones(1, 2)).sum().backward()
    before, shapes = parallel.reducer, [p.shape for p in torch_private.parameters_of(parallel)]
    module.weight.data = torch.ones(3, 2)
    stale = not torch_private.is_built_for(parallel, module.parameters())
    averaged = torch_private.averaged_by(parallel)
    module.bias.requires_grad_(False)
    torch_private.rebuild_reducer_(parallel, [module.weight])
    logged = parallel._get_ddp_logging_data()
    new = parallel.reducer is not before and not parallel._has_rebuilt_buckets and len(parallel._comm_hooks) == 1
    same = len(averaged) == len(shapes) == 2 and {id(p) for p in averaged} == {id(p) for p in module.parameters()}
    return stale and new and same and (logged["bucket_sizes"], logged["comm_hook"]) == ("24", "allreduce_hook")


@ddp_alone
def forgotten() -> bool:
    """A reducer that still waits for a backward is not called any more after `rebuild_reducer_`."""
    module = nn.Linear(2, 2)
    parallel = nn.parallel.DistributedDataParallel(module)
    calls: list[object] = []

    def hook(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        calls.append(state)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    parallel.register_comm_hook("old", hook)
    parallel(torch.ones(1, 2))
    kept = parallel.reducer  # as long as it lives, its hooks do
    torch_private.rebuild_reducer_(parallel, list(module.parameters()))
    parallel._comm_hooks.clear()
    parallel(torch.ones(1, 2)).sum().backward()
    return kept is not parallel.reducer and calls == ["old"]


@ddp_alone
def special() -> bool:
    """An ordinary DDP reduces in no special way and has all that is needed; a Join block and others are seen."""
    parallel = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    plain = torch_private.special_way_of_reducing(parallel) is None
    complete = not torch_private.missing_for_rebuilding(parallel)
    ordinary = not (parallel._delay_all_reduce_params or parallel._use_python_reducer)
    parallel._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.ALLREDUCE)  # type: ignore[attr-defined]
    hooked = "ALLREDUCE" in str(torch_private.special_way_of_reducing(parallel))
    with join.Join([parallel]):  # torch leaves the mark there afterwards
        joined = "Join" in str(torch_private.special_way_of_reducing(parallel))
    return plain and complete and ordinary and hooked and joined


def held() -> bool:
    """The parameters of a module are in a dict that can be written to, and hooks are removed from a deep copy too."""
    module = nn.Linear(2, 2)
    table, weight = torch_private.own_parameters(module), module.weight
    table["weight"] = nn.Parameter(torch.zeros(2, 2))
    replaced = module.weight is not weight
    module.register_forward_pre_hook(looks)
    twin = copy.deepcopy(module)
    torch_private.remove_hook_(twin, looks)
    return replaced and list(module._forward_pre_hooks.values()) == [looks] and not twin._forward_pre_hooks


def looks(module: nn.Module, args: Any) -> None: ...


def traced() -> bool:
    """The compiler's module is where it was, and a function is called as before."""
    seen: list[nn.Module] = []
    torch_private.uncompiled(seen.append)(module := nn.Identity())
    return seen == [module] and importlib.util.find_spec("torch._dynamo") is not None


def grouped() -> bool:
    """Lists of tensors are copied and divided in place."""
    own = [torch.ones(2), torch.zeros(1)]
    torch_private.copy_(own, [torch.full((2,), 6.0), torch.full((1,), 4.0)])
    torch_private.divide_(own, torch.tensor(2.0))
    return [each.tolist() for each in own] == [[3.0, 3.0], [2.0]]


def first() -> bool:
    """A hook that was registered last runs first, and all others after it in their order."""
    x, seen = torch.ones(2, requires_grad=True), list[int]()
    y = 2 * x
    for number in range(3):
        y.register_hook(lambda _, number=number: seen.append(number))  # type: ignore[misc]
    torch_private.hook_first_(y, lambda _: seen.append(3))
    y.sum().backward()
    return seen == [3, 0, 1, 2]


def store() -> bool:
    """The store through which a group met keeps what is written into it."""
    met = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=met, rank=0, world_size=1)
    try:
        torch_private.default_store().set("key", "value")
        return bool(torch_private.default_store().get("key") == b"value")
    finally:
        torch.distributed.destroy_process_group()


def numbered() -> bool:
    """Each backward has a number of its own, and there is -1 outside of one."""
    x, seen = torch.ones(2, requires_grad=True), list[int]()
    x.register_hook(lambda _: seen.append(torch_private.running_backward()))
    for _ in range(2):
        x.sum().backward()
    return len({*seen, -1}) == 3 and torch_private.running_backward() == -1


def ends() -> bool:
    """What is queued in a backward runs once, at its end; what it raises, the backward raises."""
    x, seen = torch.ones(2, requires_grad=True), list[bool]()

    def queue(_: Tensor) -> None:
        torch_private.after_backward(lambda: seen.append(x.grad is not None))

    handle = x.register_hook(queue)
    x.sum().backward()
    handle.remove()
    x.register_hook(lambda _: torch_private.after_backward(lambda: seen.index(None)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="None"):
        x.sum().backward()
    return seen == [True]


@ddp_alone
def taken() -> bool:
    """FSDP2's hooks after ``load_state_dict`` can be taken away for a while, and put back."""
    fsdp = importlib.import_module("torch.distributed.fsdp")
    model: Any = nn.Sequential(nn.Linear(2, 2))
    fsdp.fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    hooks = torch_private.take_load_hooks_(model[0])
    without = torch_private.is_managed_by_fsdp2(model[0])
    torch_private.put_load_hooks_(model[0], hooks)
    return not without and torch_private.is_managed_by_fsdp2(model[0])


def ddp() -> bool:
    """No DDP runs outside a forward of DDP; inside one it is found, with the parameters it was built for.

    Those that it was told to ignore are known to it too; those that came later are not.
    """
    found: list[Any] = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            found.append(torch_private.running_ddp())
            return super().forward(x)

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = Looks(2, 2)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ["bias"])
        parallel = nn.parallel.DistributedDataParallel(module)
        own = list(module.parameters())
        module.register_parameter("late", nn.Parameter(torch.ones(1)))
        parallel(torch.ones(1, 2))
        known = torch_private.known_to(parallel)
    finally:
        torch.distributed.destroy_process_group()
    same = {id(parameter) for parameter in known} == {id(parameter) for parameter in own}
    return found == [parallel] and torch_private.running_ddp() is None and same


def flattened() -> bool:
    """FSDP1 marks the parameters that it flattens; if it takes them away, it marks the modules. FSDP2 does neither."""
    seen: list[bool] = []
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        for original in (True, False):
            module: Any = nn.Sequential(nn.Linear(2, 2))
            fsdp.FullyShardedDataParallel(module, use_orig_params=original, device_id=torch.device("cpu"))
            marked = vars(module[0])[torch_private.VIEWS_FLAT] is False
            seen.append(vars(module[0].weight)[torch_private.FLATTENED] and not marked if original else marked)
        module = nn.Sequential(nn.Linear(2, 2))
        fsdp.fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        held = {**vars(module), **vars(module[0].weight)}
        seen.append(held.get(torch_private.VIEWS_FLAT) is not False and torch_private.FLATTENED not in held)
    finally:
        torch.distributed.destroy_process_group()
    return seen == [True, True, True]


def managed() -> bool:
    """FSDP2 has a hook after ``load_state_dict`` where it manages a parameter, whole or not, and nowhere else."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        ignored = set(model[1].parameters())
        fsdp.fully_shard(
            model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)), ignored_params=ignored
        )
        model(torch.ones(1, 2))
        return [torch_private.is_managed_by_fsdp2(module) for module in model] == [True, False]
    finally:
        torch.distributed.destroy_process_group()


# By the names that stand in torch_private.py: what uses them, and a check.
CANARIES: dict[str, tuple[str, Callable[[], bool]]] = {
    "_parameters": ("own_parameters", held),
    "_forward_pre_hooks": ("remove_hook_", held),
    "torch._dynamo": ("uncompiled (unsynchronised)", traced),
    "_foreach_copy_": ("copy_ (flat)", grouped),
    "_foreach_div_": ("divide_ (zero)", grouped),
    "_get_default_store": ("default_store", store),
    "_current_graph_task_id": ("running_backward", numbered),
    "_execution_engine": ("after_backward", ends),
    "_remove_autograd_hooks": ("rebuild_reducer_", forgotten),
    "_get_ddp_logging_data": ("is_built_for, special_way_of_reducing", rebuilt),
    "_get_zeros_like_grad_buckets": ("averaged_by", rebuilt),
    "_has_rebuilt_buckets": ("rebuild_reducer_", rebuilt),
    "_static_graph_delay_allreduce_enqueued": ("rebuild_reducer_", rebuilt),
    "_comm_hooks": ("rebuild_reducer_, special_way_of_reducing", rebuilt),
    "_join_config": ("is_joining, special_way_of_reducing", special),
    "_delay_all_reduce_params": ("special_way_of_reducing", special),
    "_use_python_reducer": ("special_way_of_reducing", special),
    "_backward_hooks": ("hook_first_ (barrier)", first),
    "_C": ("running_backward", numbered),
    "_load_state_dict_post_hooks": ("take_load_hooks_, is_managed_by_fsdp2", lambda: taken() and managed()),
    "torch.distributed.fsdp._fully_shard._fsdp_param": ("is_managed_by_fsdp2 (holdings)", managed),
    "_module_parameters": ("parameters_of, averaged_by, known_to", lambda: rebuilt() and ddp()),
    "_active_ddp_module": ("running_ddp (unsynchronised)", ddp),
    "_fsdp_flattened": ("FLATTENED (holdings)", flattened),
    "_fsdp_use_orig_params": ("VIEWS_FLAT (holdings)", flattened),
}


@pytest.mark.parametrize("name", CANARIES)
def test_a_private_name_of_torch_does_what_it_is_taken_for(name: str) -> None:
    """On failure, the message says what broke, what uses it, and where to fix it."""
    users, check = CANARIES[name]
    where = f"torch {torch.__version__}: its private name {name} is not what it was. {users} relies on it"
    confirm(check, where)


def test_every_private_name_in_the_file_has_a_canary() -> None:
    """Also, no canary is for a name that is no longer used."""
    source = next(s for s in read("tunerkit_distributed", FOLDER) if s.name.endswith("torch_private"))
    assert set(private_attributes(source)) == set(CANARIES)
