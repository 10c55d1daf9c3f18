"""Part `profile`: a step's time above the frozen floor, by kind of operation."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import contenders as who
from benchmarks.speed.allocator import LIMITED_SIZE
from benchmarks.speed.models import Workload, encoder
from benchmarks.speed.settings import Settings, read_sizes
from benchmarks.speed.tables import Row

PART = "profile"
NAMES = (who.PEFT_LORA, who.PEFT_ADALORA, who.LORA, who.ADALORA, who.ADALORA_SHRUNK)
REST = "rest"
_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")}
# The first entry that matches an event's name decides its kind.
KINDS: dict[str, Callable[[str], bool]] = {
    "products": lambda event: event in _PRODUCTS,
    "sums, products by element, copies": lambda event: (
        event
        in {f"aten::{name}" for name in ("add", "add_", "mul", "mul_", "sub", "sum", "copy_", "fill_", "norm", "where")}
    ),
    "optimizer and its hooks": lambda event: (
        "adamw" in event.lower() or event.startswith(("Optimizer.", "aten::_foreach"))
    ),
    "Python of our node": lambda event: "_FusedLowRank" in event or "_GradientOfInput" in event,
    REST: lambda event: True,
}


def measure(settings: Settings) -> list[Row]:
    """One size: milliseconds per step of each kind above the floor's, from the profiler's self time of each event."""
    workload = encoder(read_sizes(LIMITED_SIZE)[0], settings)
    floor = spent(who.FLOOR, workload, settings)
    return [
        Row(PART, workload.name, name, f"{kind}, ms", value - floor[kind])
        for name in NAMES
        for kind, value in spent(name, workload, settings).items()
    ]


def spent(name: str, workload: Workload, settings: Settings) -> dict[str, float]:
    """Milliseconds per step by kind, over one full interval between mask steps."""
    contender = who.build(name, workload, settings)
    contender.take(settings.delta_t - 1)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        contender.take(settings.delta_t)
    found = dict.fromkeys(KINDS, 0.0)
    for event in recorded.key_averages():
        kind = next(kind for kind, matches in KINDS.items() if matches(event.key))
        found[kind] += event.self_cpu_time_total / 1e3 / settings.delta_t
    return found
