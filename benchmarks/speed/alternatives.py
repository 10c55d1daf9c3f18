"""Part `alternatives`: implementations that were tried and rejected, kept to compare them on other machines."""

import copy
from collections.abc import Callable, Sequence

import attrs
import numpy as np
import torch
from torch import Tensor, nn

import tunerkit
from benchmarks.speed import contenders as who
from benchmarks.speed.models import Workload, encoder
from benchmarks.speed.settings import Settings, Size
from benchmarks.speed.statistics import Pairs, middle, one_kind, ratio
from benchmarks.speed.tables import Row, estimated
from benchmarks.speed.timing import Call, Times, interleave
from tunerkit.layers import products
from tunerkit_adalora.schedule import plan

PART = "alternatives"
PLAIN = "frozen floor"
OURS = "LoRA"
WIDE = "thin factors on the right"
ONCE, STAGES = "shrunk once", "shrunk in stages"
_FINE = 1000  # budgets are counted in this fraction of a rank


def measure(settings: Settings) -> list[Row]:
    """Groups of layers that read the same input, at every size; a whole training at the first size."""
    rows = []
    for size in settings.sizes:
        hidden = size.hidden
        rows += group_rows(f"q, k, v of {hidden}", hidden, (hidden,) * 3, settings)
        rows += group_rows(f"gate, up of {hidden}", hidden, (4 * hidden,) * 2, settings)
    return rows + stage_rows(settings.sizes[0], settings)


# One layer or a group


def group_rows(where: str, inputs: int, outputs: Sequence[int], settings: Settings) -> list[Row]:
    """Forward and backward of one group, above the floor's."""
    times = time_group(inputs, outputs, settings)
    kinds = one_kind(settings.pairs)
    rows = []
    for name in (OURS, WIDE):
        over = times[name] - times[PLAIN]
        rows.append(estimated(PART, where, name, "overhead, ms", middle(1e3 * over, kinds, seed=settings.seed)))
        if name != OURS:
            pairs = Pairs(top=over, bottom=times[OURS] - times[PLAIN], kinds=kinds)
            rows.append(estimated(PART, where, name, "overhead / ours", ratio(pairs, seed=settings.seed)))
    return rows


def time_group(inputs: int, outputs: Sequence[int], settings: Settings) -> dict[str, Times]:
    """Seconds of forward and backward in each round, by implementation."""
    torch.manual_seed(settings.seed)
    base = nn.ModuleList(nn.Linear(inputs, out).requires_grad_(False) for out in outputs)
    x = torch.randn(settings.batch, settings.tokens, inputs)
    grads = [torch.randn(settings.batch, settings.tokens, out) for out in outputs]
    apart = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # all read the same weights
    tunerkit.wrap(
        apart, "lora", {"targets": "re:.*", "rank": settings.init_rank, "alpha": 2.0 * settings.init_rank}, seed=0
    )
    ways: dict[str, Callable[[Tensor], list[Tensor]]] = {
        PLAIN: lambda x: [layer(x) for layer in base],
        **dict.fromkeys((OURS, WIDE), lambda x: [layer(x) for layer in apart]),
    }

    def call(name: str) -> Call:
        return lambda: torch.autograd.backward(ways[name](x.detach().requires_grad_()), grads)

    def before(name: str) -> None:
        for own in apart.parameters():
            own.grad = None
        products.is_thin = (lambda rank, factor: False) if name == WIDE else is_thin

    is_thin = products.is_thin
    try:
        calls = {name: call(name) for name in ways}
        return interleave(calls, rounds=settings.pairs, seed=settings.seed, warmup=settings.warmup, before_each=before)
    finally:
        products.is_thin = is_thin


# A whole training


def stage_rows(size: Size, settings: Settings) -> list[Row]:
    """The step time at each rank of the falling budget, and the time of a training, shrunk once or in stages.

    It uses LoRA's steps: the cost of allocation is the same either way. Copying the remaining triplets at each stage is
    not counted.
    """
    workload = encoder(size, settings)
    times = time_ranks(workload, settings)
    kinds = one_kind(settings.pairs)
    rows = [
        estimated(PART, workload.name, f"LoRA of rank {rank}", "step, ms", middle(1e3 * own, kinds, seed=settings.seed))
        for rank, own in times.items()
    ]
    pairs = Pairs(
        top=course(times, settings, in_stages=True), bottom=course(times, settings, in_stages=False), kinds=kinds
    )
    found = ratio(pairs, seed=settings.seed)
    return [*rows, estimated(PART, workload.name, STAGES, f"training / {ONCE}", found)]


def time_ranks(workload: Workload, settings: Settings) -> dict[int, Times]:
    """Seconds of a step at each rank from the target rank to the initial rank."""
    ranks = range(settings.target_rank, settings.init_rank + 1)
    training = {str(rank): who.build(who.LORA, workload, attrs.evolve(settings, init_rank=rank)) for rank in ranks}
    calls = {name: contender.step for name, contender in training.items()}
    found = interleave(calls, rounds=settings.pairs, seed=settings.seed, warmup=settings.warmup)
    return {int(name): own for name, own in found.items()}


def course(times: dict[int, Times], settings: Settings, *, in_stages: bool, steps: int = 1000) -> Times:
    """The mean step time of a training with the default schedule, in each round.

    In stages, every layer has the mean rank of the current budget. Shrunk once, it has the initial rank until the last
    allocation.
    """
    highest, lowest = settings.init_rank, settings.target_rank
    schedule = plan(
        total_steps=steps,
        t_init=0.1,
        t_final=0.3,
        delta_t=settings.delta_t,
        initial=_FINE * highest,
        target=_FINE * lowest,
    )
    mean = np.zeros_like(times[highest])
    for step in range(1, steps + 1):
        once = lowest if schedule.is_final(step) else highest
        rank = schedule.budget(step) / _FINE if in_stages else once
        below = min(int(rank), highest - 1)
        mean += (times[below] * (below + 1 - rank) + times[below + 1] * (rank - below)) / steps
    return mean
