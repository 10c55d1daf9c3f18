"""Part `compile`: graph breaks, and the time of compiled steps compared with eager ones, and with PEFT LoRA's."""

import time
import types
from collections.abc import Callable

import attrs
import torch
from torch import Tensor, nn

from benchmarks.speed import contenders as who
from benchmarks.speed.contenders import called
from benchmarks.speed.models import Output, Workload, encoders
from benchmarks.speed.settings import Settings
from benchmarks.speed.statistics import Pairs, middle, ratio
from benchmarks.speed.steps import kinds_of
from benchmarks.speed.tables import Row, estimated
from benchmarks.speed.timing import interleave

PART = "compile"
NAMES = (who.FLOOR, who.PEFT_LORA, who.LORA, who.ADALORA)
LIMITS = {who.LORA: 0.0, who.ADALORA: 0.0}
RATIO, RATIO_LIMITS = "step / PEFT LoRA's compiled", {who.LORA: 0.9, who.ADALORA: 0.9}


def measure(settings: Settings) -> list[Row]:
    """The first and the last encoder only: compiling takes longer than everything else here."""
    ends = dict.fromkeys((settings.sizes[0], settings.sizes[-1]))
    several = encoders(attrs.evolve(settings, sizes=tuple(ends)))
    return [row for workload in several for row in (*break_rows(workload, settings), *time_rows(workload, settings))]


def break_rows(workload: Workload, settings: Settings) -> list[Row]:
    """Graph breaks of the forward."""
    return [
        Row(PART, workload.name, name, "graph breaks", graph_breaks(name, workload, settings), limit=LIMITS.get(name))
        for name in NAMES
    ]


def graph_breaks(name: str, workload: Workload, settings: Settings) -> int:
    """The number of graph breaks of torch.compile."""
    torch.compiler.reset()
    contender = who.build(name, workload, settings)
    x = workload.x.detach().requires_grad_()
    return int(torch._dynamo.explain(called(name, contender.model))(x, workload.target).graph_break_count)


def time_rows(workload: Workload, settings: Settings) -> list[Row]:
    """Whole steps, eager and with the forward compiled as one graph, interleaved; a graph break raises an error."""
    torch.compiler.reset()
    training, first = {}, {}
    for name in NAMES:
        training[f"{name}, eager"] = who.build(name, workload, settings)
        contender = who.build(name, workload, settings)
        contender.call = compiled(called(name, contender.model), settings.backend)
        began = time.perf_counter()
        contender.step()
        first[f"{name}, compiled"] = time.perf_counter() - began
        training[f"{name}, compiled"] = contender
    calls = {name: contender.step for name, contender in training.items()}
    times = interleave(calls, rounds=settings.pairs, seed=settings.seed, warmup=settings.warmup)
    kinds = kinds_of(settings)
    rows = []
    for name, found in times.items():
        rows.append(estimated(PART, workload.name, name, "step, ms", middle(1e3 * found, kinds, seed=settings.seed)))
        plain, _, how = name.rpartition(", ")
        if how != "compiled":
            continue
        rows.append(Row(PART, workload.name, name, "first step, s", first[name]))
        others = {"step / eager's": f"{plain}, eager", RATIO: f"{who.PEFT_LORA}, compiled"}
        for measure, other in others.items():
            if name != other:
                estimate = ratio(Pairs(found, times[other], kinds), seed=settings.seed)
                limit = RATIO_LIMITS.get(plain) if measure == RATIO else None
                rows.append(estimated(PART, workload.name, name, measure, estimate, limit))
    return rows


def compiled(module: nn.Module, backend: str) -> Callable[[Tensor, Tensor], Output]:
    """The module with its forward compiled as one graph.

    A function with a separate code object calls it. Dynamo caches graphs by code object and does not guard hooks.
    Otherwise two models of one class would run each other's graphs, for example the floor's instead of an adapter's.
    """

    def call(x: Tensor, target: Tensor) -> Output:
        found: Output = module(x, target)
        return found

    own = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    graph: Callable[[Tensor, Tensor], Output] = torch.compile(own, fullgraph=True, backend=backend)
    return graph
