"""Part `memory`: bytes held between steps, and the peak within them."""

import attrs
import torch

from benchmarks.speed import contenders as who
from benchmarks.speed.models import Workload, encoders
from benchmarks.speed.settings import Settings
from benchmarks.speed.storages import held_bytes, peak_bytes
from benchmarks.speed.tables import Row

PART = "memory"
NAMES = (
    who.FLOOR,
    who.PEFT_LORA,
    who.PEFT_ADALORA,
    who.PEFT_ADALORA_FINAL,
    who.LORA,
    who.ADALORA,
    who.ADALORA_GAMMA,
    who.ADALORA_MASKED,
    who.ADALORA_SHRUNK,
)
# Two averages plus 2 %. In the final phase there are only masks: a byte for each triplet.
LIMITS = {who.LORA: 0.001, who.ADALORA: 2.04, who.ADALORA_GAMMA: 2.04, who.ADALORA_SHRUNK: 0.001}
_MIB = 2**20


@attrs.frozen
class Bytes:
    """One contender's memory: its trained parameters, all that is held between steps, and the peak within a step."""

    trained: int
    tensors: int
    held: int
    peak: int


def measure(settings: Settings) -> list[Row]:
    """All encoders."""
    return [row for workload in encoders(settings) for row in rows_of(workload, settings)]


def rows_of(workload: Workload, settings: Settings) -> list[Row]:
    """The memory that each contender holds, and its peak above the floor's."""
    found = {name: weigh(name, workload, settings) for name in NAMES}
    floor = found[who.FLOOR]
    rows = [Row(PART, workload.name, who.FLOOR, "peak in a step, MiB", floor.peak / _MIB)]
    for name in NAMES[1:]:
        taken = found[name]
        extra = taken.held - floor.held - plain_bytes(taken)
        measures = {
            "trained, MiB": taken.trained / _MIB,
            "held, MiB": (taken.held - floor.held) / _MIB,
            "held beyond plain training, bytes": extra,
            "peak above the floor's, MiB": (taken.peak - floor.peak) / _MIB,
        }
        rows += [Row(PART, workload.name, name, measure, value) for measure, value in measures.items()]
        share = extra / taken.trained
        rows.append(Row(PART, workload.name, name, "beyond, share of trained", share, limit=LIMITS.get(name)))
    return rows


def weigh(name: str, workload: Workload, settings: Settings) -> Bytes:
    """Train one contender alone past a mask step. The peak is the highest of ``delta_t`` steps."""
    before = held_bytes()
    contender = who.build(name, workload, settings)
    contender.step()
    peak = max(peak_bytes(contender.step, workload.x.device) for _ in range(settings.delta_t))
    own = contender.trained()
    trained = sum(p.nbytes for p in own)
    return Bytes(trained=trained, tensors=len(own), held=held_bytes() - before, peak=peak)


def plain_bytes(taken: Bytes) -> int:
    """Bytes that plain training of the same parameters takes: the parameters, AdamW's moments and its fp32 counters."""
    return 3 * taken.trained + taken.tensors * torch.float32.itemsize
