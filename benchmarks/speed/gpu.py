"""Part `gpu`: steps in the forms in which people train on a GPU, and memory; without one, in small form on the CPU.

Adapters are fp32, the base bf16 under autocast. Unsloth isn't here: it builds models itself.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping

import attrs
import torch
from torch import nn

from benchmarks.speed import compiled, contenders as who, memory, steps
from benchmarks.speed.models import LLAMA_SHAPES, Workload, large_llama
from benchmarks.speed.settings import Settings
from benchmarks.speed.statistics import ratio
from benchmarks.speed.tables import Row
from benchmarks.speed.timing import Call, Times, cuda_seconds, interleave

PART = "gpu"
BATCH, TOKENS = 4, 512
SMALL = {"small": (64, 128, 1, 2, 1)}  # on a CPU, to see that all of it runs
NOISE, MOST_NOISE = "noise", 1.1
EAGER, COMPILED, GRAPH, NF4, LIGER = "eager", "compiled", "CUDA graph", "nf4", "Liger"  # Liger last: it patches classes
FORMS = (EAGER, COMPILED, GRAPH, NF4, LIGER)


def measure(settings: Settings) -> list[Row]:
    """All forms at one shape after the other; all contenders of a form share its base."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        settings = attrs.evolve(settings, batch=BATCH, tokens=TOKENS)
    else:
        _say("no GPU is at hand: this is a small model on the CPU, and says nothing of one")
    rows = []
    for form in FORMS:
        lacking = obstacle(form, device)
        if lacking is not None:
            _say(f"{form} is left out: {lacking}")
            continue
        for name, shape in (LLAMA_SHAPES if device == "cuda" else SMALL).items():
            if device == "cuda" and not fits(shape, form):
                _say(f"{form}, {name} is left out: the model does not fit into the card's memory")
                continue
            workload = prepared(form, large_llama(f"{name}, {form}, {device}", shape, settings, device))
            rows += rows_of(form, workload, settings)
    return rows


def rows_of(form: str, workload: Workload, settings: Settings) -> list[Row]:
    """Steps of one form, how noisy they are, and memory once for each kind of base."""
    is_gpu = workload.x.device.type == "cuda"
    timed = functools.partial(interleave, clock=cuda_seconds) if is_gpu else interleave
    calls: dict[str, Call] = {}
    for name in steps.NAMES:
        if (form, name) == (COMPILED, who.PEFT_ADALORA):
            continue  # its regulariser breaks the graph
        contender = who.build(name, workload, settings)
        try:
            calls[name] = called(form, contender, settings)
        except RuntimeError as problem:
            _say(f"{form}: {name} is left out: {str(problem).splitlines()[0]}")
    times = timed(calls, rounds=settings.pairs, seed=settings.seed, warmup=settings.warmup)
    rows = steps.rows_of(workload.name, times, settings, PART)
    if {who.FLOOR, who.PEFT_LORA, who.PEFT_LORA_AGAIN} <= times.keys():
        rows.append(noise_row(workload.name, times, settings))
    if form in (EAGER, NF4):
        rows += [attrs.evolve(row, part=PART) for row in memory.rows_of(workload, settings)]
    return rows if is_gpu else [attrs.evolve(row, limit=None) for row in rows]


def noise_row(where: str, times: Mapping[str, Times], settings: Settings) -> Row:
    """By which factor the overheads of two identical contenders may differ. Above the limit, no ratio there counts."""
    pairs = steps.overheads(times, who.PEFT_LORA_AGAIN, steps.kinds_of(settings))
    found = ratio(pairs, seed=settings.seed)
    apart = max(found.high, 1 / found.low) if found.low > 0 else float("inf")
    return Row(PART, where, who.PEFT_LORA_AGAIN, NOISE, apart, limit=MOST_NOISE)


def obstacle(form: str, device: str) -> str | None:
    """Why a form cannot be measured here; None if it can."""
    packages = {NF4: "bitsandbytes", LIGER: "liger_kernel"}
    if form in packages and importlib.util.find_spec(packages[form]) is None:
        return f"{packages[form]} is not installed"
    return f"it needs a GPU, and this is a {device.upper()}" if form in (GRAPH, LIGER) and device != "cuda" else None


def fits(shape: tuple[int, ...], form: str) -> bool:
    """Whether the base takes at most half of the card's memory; the other half is for activations and contenders.

    A base in nf4 takes a quarter, but is built in bf16 first, when nothing else is there.
    """
    hidden, intermediate, blocks, heads, kv_heads = shape
    numbers = blocks * hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * intermediate)
    total: int = torch.cuda.get_device_properties(0).total_memory
    return 2 * numbers <= total * (0.9 if form == NF4 else 0.5)


def prepared(form: str, workload: Workload) -> Workload:
    """The workload with the base that a form needs."""
    if form == NF4:
        quantise_(workload.base)
    elif form == LIGER:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

        apply_liger_kernel_to_llama(model=workload.base.body, cross_entropy=False, fused_linear_cross_entropy=False)
    return workload


def quantise_(base: nn.Module) -> None:
    """Replace the linear layers of the blocks by bitsandbytes' in nf4, which compute in bf16."""
    import bitsandbytes

    for path, linear in [(path, module) for path, module in base.named_modules() if isinstance(module, nn.Linear)]:
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        weight = linear.weight.detach()
        packed.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        parent, _, name = path.rpartition(".")
        base.get_submodule(parent).add_module(name, packed.to(weight.device))


def called(form: str, contender: who.Contender, settings: Settings) -> Call:
    """A training step of a contender in a form."""
    if form == COMPILED:
        contender.call = compiled.compiled(who.called(contender.name, contender.model), settings.backend)
        contender.step()  # compiles, outside of the rounds
    return graphed(contender) if form == GRAPH else contender.step


def graphed(contender: who.Contender) -> Call:
    """A step that replays a CUDA graph, with a capturable optimizer.

    What allocates does so on the host after the optimizer's step: only forward and backward are in its graph.
    """
    optimizer = contender.optimizer
    for group in optimizer.param_groups if optimizer is not None else ():
        group["capturable"] = True
    allocates = who.is_adalora(contender.name)
    captured = contender.pass_through if allocates else contender.step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            contender.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    return (lambda: _replay_and_update(graph.replay, contender)) if allocates else graph.replay


def _replay_and_update(replay: Callable[[], None], contender: who.Contender) -> None:
    replay()  # it overwrites the gradients, so they are not set to None
    contender.steps += 1
    assert contender.optimizer is not None
    contender.optimizer.step()
    if contender.allocate is not None:
        contender.allocate(contender.steps)


def _say(text: str) -> None:
    print(f"benchmarks.speed, {PART}: {text}", file=sys.stderr)
